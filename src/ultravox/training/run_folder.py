"""A run's folder: one process at a time, and never replaced unasked."""

import fcntl
import os
import shutil
from contextlib import ExitStack
from pathlib import Path

from ultravox.errors import ConfigError, UltravoxError
from ultravox.files import make_folder, making

#: What a run leaves behind; a new run in the same folder removes it.
RUN_FILES = (
    "config.yaml",
    "log.jsonl",
    "samples",
    "tensorboard",
    "trackers",
    "trackers.json",
    "checkpoints",
    "model",
    "heads",
    "train.json",
    "results.json",
    "predictions.jsonl",
    "alignment.json",
    "report.html",
    "evaluations",
    "whole.json",  # how long all of `make quickstart` took, by benchmarks/quickstart.py
)


def lock(run_dir: Path, stack: ExitStack) -> None:
    """Keep a run folder for this process until `stack` closes."""
    make_folder(run_dir)
    with making(run_dir):  # not "w", which would wipe out the holder's number
        file = stack.enter_context((run_dir / ".lock").open("a+"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = f" (pid {pid})" if (pid := file.read(20).strip()).isdigit() else ""
        raise UltravoxError(
            f"another process{holder} is training in {run_dir}: wait for it, stop it, or choose another --run_dir"
        ) from error
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    stack.callback(file.truncate, 0)  # before it closes: no number of a process that is gone


def require_free(run_dir: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds other things and no run, or a run that cost time to train; ConfigError.

    With `overwrite` a run may be there: `clear` will remove it.
    """
    there = [path for path in run_dir.iterdir() if path.name != ".lock"]
    if there and not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"{run_dir} holds files but no run: choose another run_dir, or empty it")
    if not overwrite and (any(run_dir.glob("checkpoints/[!.]*")) or (run_dir / "model").is_dir()):
        if (run_dir / "train.json").is_file():
            what = "a finished run, which --resume trains no further: "
        else:
            what = "a run with checkpoints: go on with it (--resume), "
        raise ConfigError(f"{run_dir} holds {what}replace it (--overwrite), or choose another --run_dir")


def clear(run_dir: Path) -> None:
    """Remove an earlier run."""
    for path in (run_dir / name for name in RUN_FILES):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
