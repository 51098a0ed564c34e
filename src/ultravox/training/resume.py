"""Whether a run may be gone on with: what decided its numbers is what it was; and what to do where it is not."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ultravox.errors import CheckpointError
from ultravox.training.checkpoint import checkpoint_folder

MOST_DIFFERENCES = 8
HASH = re.compile(r"[0-9a-f]{32,}")


def require_same_config(saved: Mapping[str, Any], current: Mapping[str, Any], folder: Path) -> None:
    """Refuse to resume under another configuration. CheckpointError lists the keys that differ, stages by name."""
    differences = list(compare(saved, current, ""))
    if any(path.endswith(".max_steps") for path, _ in differences):
        remedy = (
            "a run cannot be made longer or shorter, since its learning rates were planned for its steps: restore "
            "them, or train a new run from the beginning, with another --run_dir (speech in the cache is not encoded "
            "again)"
        )
    else:
        remedy = "restore it, or start anew in another run_dir"
    _refuse(folder, "the configuration", [text for _, text in differences], remedy)


def require_same(saved: Mapping[str, Any], current: Mapping[str, Any], what: str, folder: Path) -> None:
    """Refuse to resume when something else that decides the run's numbers has changed; CheckpointError says what."""
    differences = [text for _, text in compare(saved, current)]
    _refuse(folder, what, differences, "restore it, or start anew in another run_dir")


def require_same_data(
    state: Mapping[str, Any], current: Mapping[str, str], sizes: Mapping[str, int], folder: Path
) -> None:
    """Refuse to resume on other data; CheckpointError says how many clips there were and are.

    Args:
        state: of the checkpoint.
        current: source → fingerprint.
        sizes: source → clips that are used; 0 of a stream.
        folder: of the checkpoint.
    """
    differences, saved = [], state["data"]
    for key in [*saved, *(key for key in current if key not in saved)]:
        before, now = state["sizes"].get(key, 0), sizes.get(key, 0)
        if key not in current or key not in saved:
            differences.append(f"{key} {'was not there' if key in current else 'is no longer there'}")
        elif saved[key] != current[key] and before != now:
            differences.append(f"{key} had {before} clips, has {now}")
        elif saved[key] != current[key]:
            count = f"{now} clips as before, but other" if now else "other"
            differences.append(f"{key} has {count} texts, tokens or audio")
    _refuse(folder, "the training data", differences, "restore it, or start anew in another run_dir")


def is_finished(run_dir: Path, stage: str, steps: int, newest: Path) -> bool:
    """Whether the newest checkpoint is that of the last stage's last step, and what comes after it is there as well."""
    whole = (run_dir / "train.json").is_file() and (run_dir / "model").is_dir()
    return whole and newest == checkpoint_folder(run_dir, stage, steps)


def finished_text(run_dir: Path, stages: Sequence[tuple[str, int]]) -> str:
    """What to tell who goes on with a finished run: names of the stages and their steps."""
    done = ", ".join(f"{name} {steps}" for name, steps in stages)
    return (
        f"{run_dir} is finished (steps: {done}); nothing is left to train. To train longer, begin a new run with "
        f"more steps and another run_dir, such as --run_dir {run_dir}-longer --stages.{stages[-1][0]}.max_steps "
        f"{2 * stages[-1][1]}"
    )


def _refuse(folder: Path, what: str, differences: list[str], remedy: str) -> None:
    if differences:
        more = len(differences) - MOST_DIFFERENCES
        named = "; ".join(differences[:MOST_DIFFERENCES]) + (f" and {more} more" if more > 0 else "")
        raise CheckpointError(f"cannot resume from {folder}: {what} differs: {named}; {remedy}")


def compare(saved: Any, current: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Keys that differ, and how."""
    before, now = _as_mapping(saved), _as_mapping(current)
    if before is not None and now is not None:
        for key in [*before, *(key for key in now if key not in before)]:
            inside = f"{path}.{key}".lstrip(".")
            if key not in now:
                yield inside, f"{inside} was {_shown(before[key])}, is no longer there"
            elif key not in before:
                yield inside, f"{inside} is {_shown(now[key])}, was not there"
            else:
                yield from compare(before[key], now[key], inside)
        common = [[key for key in keys if key in before and key in now] for keys in (before, now)]
        if isinstance(saved, list) and common[0] != common[1]:
            yield path, f"{path} were in the order {', '.join(common[0])}, are in the order {', '.join(common[1])}"
    elif saved != current:
        yield path, f"{path} was {_shown(saved)}, is {_shown(current)}"


def _as_mapping(value: Any) -> Mapping[str, Any] | None:
    """A section, or a list of sections by their names or, where those do not tell them apart, by their numbers."""
    if isinstance(value, Mapping):
        return value
    if not (isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value)):
        return None
    names = [item.get("name") for item in value]
    if all(isinstance(name, str) for name in names) and len(set(names)) == len(names):
        return dict(zip(names, value, strict=True))
    return {str(index): item for index, item in enumerate(value)}


def _shown(value: Any) -> str:
    """A value in a few words: the beginning of a hash, a section's name alone."""
    if isinstance(value, Mapping):
        return "there"
    text = HASH.sub(lambda found: f"{found[0][:12]}…", repr(value))
    return text if len(text) <= 80 else f"{text[:79]}…"
