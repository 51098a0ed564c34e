"""Which example went into which step, for ``ultravox data audit``: the log of `ultravox.data.sample_log`, by stage."""

from collections.abc import Sequence
from pathlib import Path

from ultravox.data.sample_log import SampleLog
from ultravox.training.trainer import StepRecord

FOLDER = "samples"


def samples_folder(run_dir: Path, stage: str) -> Path:
    """Where the logs of a stage's ranks are."""
    return run_dir / FOLDER / stage


class StepSamples:
    """Writes the examples of each step."""

    def __init__(self, log: SampleLog, source_names: Sequence[str], *, streamed: bool = False) -> None:
        """Args:
        log: of this rank.
        source_names: of each source, by the index that examples have.
        streamed: whether each row has an epoch of its own, that of its stream.
        """
        self._log, self._names, self._streamed = log, source_names, streamed

    def on_step(self, record: StepRecord) -> None:
        for loaded in record.batches:
            streamed = {"epochs": loaded.batch.copies, "window": loaded.position[1]} if self._streamed else {}
            self._log.write(
                step=record.step - 1,
                micro_batch=loaded.index,
                worker=loaded.worker,
                epoch=loaded.batch.epoch,
                uids=loaded.batch.uids,
                sources=[self._names[source] for source in loaded.batch.sources],
                **streamed,
            )

    def on_evaluation(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """Nothing is trained on."""

    def close(self) -> None:
        self._log.close()
