"""Which checkpoints a run keeps, and their writing beside training, here and in a store elsewhere.

A checkpoint is written from a copy, so that training goes on meanwhile; one is in writing at a time. The copy too is
made beside training, which waits for it before it changes a weight (`settle`). What failed is told when the next one
is saved, or at the end: a run whose checkpoints cannot be written does not go on as if they were.
"""

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ultravox.config.checkpoints import LESS_IS_BETTER, CheckpointsConfig
from ultravox.errors import CheckpointError, UltravoxError
from ultravox.files import atomic_folder
from ultravox.training.checkpoint import (
    MANIFEST,
    Checkpoint,
    checkpoint_folder,
    list_checkpoints,
    remove_checkpoints,
    save_checkpoint,
)


class CheckpointStore:
    """The checkpoints of one run. Close it, or the last one may not be whole."""

    def __init__(
        self,
        run_dir: Path,
        stages: Sequence[str],
        *,
        keep_last: int = 2,
        keep_every: int = 0,
        keep_best: str | None = None,
        background: bool = True,
        upload: str | None = None,
    ) -> None:
        """Args:
        run_dir: of the run.
        stages: their names, in order.
        keep_last, keep_every, keep_best: which are kept; see `CheckpointsConfig`.
        background: write in a thread.
        upload: folder of an fsspec store that gets a copy of each.
        """
        self.run_dir, self.stages = run_dir, list(stages)
        self._last, self._every, self._best = keep_last, keep_every, keep_best
        self._background, self._upload = background, upload
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()
        """Set as long as no tensor that was given to `save` is still to be read."""
        self._copied.set()
        self._error: BaseException | None = None

    @classmethod
    def from_config(
        cls, run_dir: Path, stages: Sequence[str], config: CheckpointsConfig, **more: Any
    ) -> "CheckpointStore":
        """As a run's configuration says; `more` are further arguments of a subclass."""
        return cls(
            run_dir,
            stages,
            keep_last=config.keep_last,
            keep_every=config.keep_every,
            keep_best=config.keep_best,
            background=config.background,
            upload=config.upload,
            **more,
        )

    def save(self, stage: str, step: int, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, and remove those that are no longer kept. Waits for the one before it.

        Its tensors must stay as they are until `settle` returns.

        Raises:
            UltravoxError: the one before it, or this one, could not be written.
        """
        self.join()
        folder = checkpoint_folder(self.run_dir, stage, step)
        if not self._background:
            self._write(folder, checkpoint)
            return
        self._copied.clear()
        # Not a daemon: at a normal end the interpreter waits for it. A kill leaves a temporary folder, which is no
        # checkpoint and which the next one to be written clears away.
        self._thread = threading.Thread(target=self._try, args=(folder, checkpoint), name="checkpoint")
        self._thread.start()

    def settle(self) -> None:
        """Wait until the tensors of what was saved may change."""
        self._copied.wait()

    def join(self) -> None:
        """Wait until what was saved is whole. Raises what stood in its way."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """What went wrong in writing is told, unless something else went wrong already."""
        try:
            self.join()
        except Exception:
            if kind is None:
                raise

    def _try(self, folder: Path, checkpoint: Checkpoint) -> None:
        try:
            trainable, optimizer = self.copied(checkpoint.trainable), self.copied(checkpoint.optimizer)
            self._copied.set()
            self._write(folder, Checkpoint(trainable, optimizer, checkpoint.state))
        except BaseException as error:  # told by `join`, in the thread that trains
            self._error = error
        finally:
            self._copied.set()

    def _write(self, folder: Path, checkpoint: Checkpoint) -> None:
        save_checkpoint(folder, checkpoint)
        self._after(folder)

    def copied(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """On the CPU, and not to be changed by further steps."""
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}

    def _after(self, folder: Path) -> None:
        """What follows once a checkpoint is whole."""
        if self._upload is not None:
            upload_checkpoint(folder, self._upload)
        remove_checkpoints(self.run_dir, self.superseded())

    def superseded(self) -> list[Path]:
        """Those that need not be kept, oldest first."""
        found = list_checkpoints(self.run_dir, self.stages)
        kept = set(found[-self._last :])
        if self._every:
            kept |= {folder for folder in found if int(folder.name.rpartition("-")[2]) % self._every == 0}
        if self._best is not None:
            kept |= set(best_of_stages(found, self._best).values())
        return [folder for folder in found if folder not in kept]


def best_of_stages(folders: Sequence[Path], metric: str) -> dict[str, Path]:
    """Stage → its checkpoint whose evaluation is best by a metric, the first of equals; none where none was evaluated.

    A checkpoint is judged by the last evaluation before it, if that was at its own step.
    """
    sign = 1 if LESS_IS_BETTER[metric] else -1
    best: dict[str, tuple[float, Path]] = {}
    for folder in folders:
        state = json.loads((folder / "state.json").read_bytes())
        value = state.get("metrics", {}).get(metric)
        stage = folder.name.rpartition("-")[0]
        if value is not None and (stage not in best or sign * value < best[stage][0]):
            best[stage] = (sign * value, folder)
    return {stage: folder for stage, (_, folder) in best.items()}


def upload_checkpoint(folder: Path, target: str) -> None:
    """Copy a checkpoint to `<target>/<its name>/`; the manifest last, without which it is not whole.

    Raises:
        UltravoxError: whatever the store says.
    """
    store, root = _store(target)
    place = f"{root.rstrip('/')}/{folder.name}"
    try:
        store.makedirs(place, exist_ok=True)
        names = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST)
        for name in [*names, MANIFEST]:
            store.put_file(str(folder / name), f"{place}/{name}")
    except Exception as error:  # each store has errors of its own
        raise UltravoxError(f"{folder.name} could not be copied to {target}: {error}") from error


def download_newest(target: str, run_dir: Path, stages: Sequence[str]) -> Path | None:
    """Fetch the newest whole checkpoint of a store into a run's folder; None where there is none.

    Raises:
        UltravoxError: whatever the store says.
    """
    store, root = _store(target)
    try:
        places = store.ls(root, detail=False) if store.exists(root) else []
        whole = [place for place in places if store.exists(f"{place}/{MANIFEST}")]
        named = [(*place.rstrip("/").rpartition("/")[2].rpartition("-")[::2], place) for place in whole]
        found = [(list(stages).index(s), int(n), place) for s, n, place in named if s in stages and n.isdigit()]
        if not found:
            return None
        stage, step, place = max(found)
        folder = checkpoint_folder(run_dir, stages[stage], step)
        with atomic_folder(folder) as temporary:
            for name in store.ls(place, detail=False):
                store.get_file(name, str(temporary / Path(name).name))
    except UltravoxError:
        raise
    except Exception as error:
        raise UltravoxError(f"no checkpoint could be fetched from {target}: {error}") from error
    return folder


def require_store(target: str) -> None:
    """Refuse a store that cannot be reached, before anything is trained. UltravoxError says why."""
    store, root = _store(target)
    try:
        store.makedirs(root, exist_ok=True)
        store.ls(root)
    except Exception as error:
        raise UltravoxError(f"checkpoints.upload {target} cannot be used: {error}") from error


def _store(target: str) -> tuple[Any, str]:
    import fsspec

    try:
        return fsspec.core.url_to_fs(target)
    except Exception as error:  # an unknown protocol, or one whose package is missing
        raise CheckpointError(
            f"checkpoints.upload {target!r} is no place that fsspec knows ({error}): expected a URL such as "
            "s3://bucket/run, abfs://container/run or gs://bucket/run, and the store's package installed"
        ) from error
