"""TensorBoard files, when the extra ``tensorboard`` is installed."""

from pathlib import Path

from ultravox.training.trackers.window import Window, row_of
from ultravox.training.trainer import StepRecord


class TensorBoardLog:
    """Writes one stage's curves under `<stage>/…`. Each stage has a folder of its own, since purging is by folder.

    A stage that goes on from `step`, after `elapsed_seconds`, is rid of the points that were logged later.
    """

    def __init__(self, folder: Path, log_every: int, step: int = 0, elapsed_seconds: float = 0.0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1)
        self._window, self._log_every = Window(start=elapsed_seconds), log_every

    def on_step(self, record: StepRecord) -> None:
        self._window.add(record)
        if record.step % self._log_every == 0 or record.step == record.max_steps:
            for name, value in row_of(self._window, record).items():
                self._writer.add_scalar(f"{record.stage}/{name}", value, record.step)

    def on_evaluation(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(f"{stage}/{name}", value, step)

    def close(self) -> None:
        self._writer.close()


def tensorboard_is_installed() -> bool:
    """Whether the extra is there."""
    from importlib.util import find_spec

    return find_spec("tensorboard") is not None
