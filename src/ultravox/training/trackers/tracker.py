"""What each experiment tracker does, said once: start or continue a run, take numbers, transcripts and checkpoints."""

import abc
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal

from ultravox.audio.waveform import write_waveform
from ultravox.auth.credentials import Found, Service, is_valid
from ultravox.errors import ConfigError
from ultravox.training.task import Transcript

Outcome = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True, slots=True)
class TrackerOptions:
    """What a tracker is told about its run."""

    project: str
    run_name: str
    folder: Path
    """For its files; all of them when offline."""
    offline: bool = False


class Tracker(abc.ABC):
    """One tracker's library. Whatever it raises, its caller deals with.

    Steps are those of the whole run: the first step of the second stage follows the last one of the first.
    """

    name: ClassVar[str]
    """Of the configuration, and of the extra."""
    modules: ClassVar[tuple[str, ...]]
    """What must be importable."""
    service: ClassVar[Service | None] = None
    """Whose credentials it needs, unless offline."""

    def __init__(self, options: TrackerOptions) -> None:
        self.options = options
        self.stack = ExitStack()
        """What `start` has changed outside; its caller closes it after `finish`, and when `start` has failed."""

    @classmethod
    def require_installed(cls) -> None:
        """ConfigError that names the extra."""
        if any(find_spec(module) is None for module in cls.modules):
            raise ConfigError(
                f"logging.trackers names {cls.name}, which is not installed: pip install 'ultravox[{cls.name}]', or "
                "drop it"
            )

    @classmethod
    @abc.abstractmethod
    def require_ready(cls, offline: bool, found: Mapping[str, Found]) -> None:
        """Before anything heavy is loaded: ConfigError when it is plain that `start` would fail.

        Args:
            offline: whether nothing leaves this machine.
            found: the credentials of its service.
        """

    @abc.abstractmethod
    def start(self, run_id: str | None, config: dict[str, Any]) -> str:
        """Begin a run, or go on with the one of this id; returns its id.

        Args:
            run_id: as an earlier `start` with the same project has returned it; None = a new run.
            config: the resolved configuration of the run.
        """

    @abc.abstractmethod
    def log(self, values: Mapping[str, float], step: int) -> None:
        """Finite numbers, `<stage>/<name>` → value."""

    @abc.abstractmethod
    def log_transcripts(self, stage: str, transcripts: Sequence[Transcript], step: int) -> None:
        """Recordings, and a table of their texts."""

    @abc.abstractmethod
    def log_checkpoint(self, folder: Path, step: int) -> None:
        """Keep a copy of a checkpoint's folder, which may be gone soon after."""

    @abc.abstractmethod
    def finish(self, outcome: Outcome) -> None:
        """Send what is left, and let go of everything."""


def require_key(name: str, service: str, found: Mapping[str, Found], *variables: str) -> None:
    """ConfigError unless all these are set and look right; says how to set them, and never what they are."""
    if missing := [variable for variable in variables if variable not in found]:
        raise ConfigError(
            f"logging.trackers names {name}, but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not "
            f"set: set {'it' if len(missing) == 1 else 'them'} in the environment or in .env ({service}; see "
            "docs/auth.md), or log offline with --logging.offline true"
        )
    if odd := [variable for variable in variables if not is_valid(variable, found[variable])]:
        raise ConfigError(
            f"{odd[0]} (from {found[odd[0]].source}) does not look like one of {service}: copy it anew; `ultravox auth "
            "check` shows what is set"
        )


def table(transcripts: Sequence[Transcript]) -> dict[str, list[str]]:
    """The texts, by column."""
    return {
        "clip": [transcript.id for transcript in transcripts],
        "reference": [transcript.reference for transcript in transcripts],
        "hypothesis": [transcript.hypothesis for transcript in transcripts],
    }


def caption(transcript: Transcript) -> str:
    """What is written below a player."""
    return f"{transcript.id}: {transcript.reference} → {transcript.hypothesis}"


@contextmanager
def wave_files(transcripts: Sequence[Transcript]) -> Iterator[list[tuple[Transcript, Path]]]:
    """The recordings as files, as long as the block runs; rows without one are left out."""
    with TemporaryDirectory(prefix="ultravox-") as folder:
        files = []
        for index, transcript in enumerate(transcripts):
            if (waveform := transcript.load()) is not None:
                path = Path(folder) / f"{index:02d}-{re.sub(r'[^A-Za-z0-9.-]+', '_', transcript.id)[-80:]}.wav"
                write_waveform(path, waveform)
                files.append((transcript, path))
        yield files
