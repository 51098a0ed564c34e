"""Readings to audio files: the engine behind every synthetic dataset, the bundled ones too.

A voice's reading may depend on what it read before (Piper's does), so readings are dealt to shards, and each shard has
voices and a seed of its own. A shard gives the same bytes wherever and whenever it is spoken; one that a journal holds
is not spoken again.
"""

import io
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ultravox.data.endpoints import RefusedRequest
from ultravox.data.journal import Journal
from ultravox.data.voices import Voice
from ultravox.errors import AudioError, DataError
from ultravox.files import atomic_write

SAMPLE_RATE = 16_000
KIND = "speech"  # of these parts in a journal

MakeVoice = Callable[[int], Voice]  # from a seed


@dataclass(frozen=True, slots=True)
class Reading:
    """How one text is read: ``pace`` above 1 is slower, ``pitch`` above 1 is higher with a smaller throat."""

    text: str
    voice: int
    pace: float = 1.0
    pitch: float = 1.0
    noise: float = 0.667
    level_db: float = -3.0
    lead_seconds: float = 0.1
    tail_seconds: float = 0.1


@dataclass(frozen=True, slots=True)
class Shard:
    """Readings with the files that they go to, spoken one after the other by voices made from one seed."""

    seed: int
    jobs: Sequence[tuple[Reading, Path]]


@dataclass(frozen=True, slots=True)
class Spoken:
    """What became of a reading: its seconds, or why there is no file."""

    seconds: float
    fault: str = ""


def speak_reading(voice: Voice, reading: Reading, max_seconds: float) -> np.ndarray:
    """Float32 samples [sample] at 16 kHz, peak at the reading's level, silence around it. DataError when it is bad."""
    import soxr

    # Played back faster by `pitch`, which raises pitch and formants together; spoken slower by as much beforehand.
    waveform = voice.speak(reading.text, reading.pace * reading.pitch, reading.noise)
    if not np.isfinite(waveform).all():
        raise DataError(f"the voice {voice.name} made samples that are no numbers for {reading.text!r}")
    if waveform.size == 0 or not np.abs(waveform).max() > 0:
        raise DataError(f"the voice {voice.name} said nothing for {reading.text!r}")
    waveform = soxr.resample(waveform, voice.sample_rate * reading.pitch, SAMPLE_RATE)
    waveform = waveform * (10 ** (reading.level_db / 20) / np.abs(waveform).max())
    padding = [int(seconds * SAMPLE_RATE) for seconds in (reading.lead_seconds, reading.tail_seconds)]
    waveform = np.pad(waveform, padding).astype(np.float32)
    if (seconds := len(waveform) / SAMPLE_RATE) > max_seconds:
        raise DataError(f"the voice {voice.name} spoke for {seconds:.1f} s, longer than {max_seconds:g} s")
    return waveform


def speak_shards(
    shards: Sequence[Shard],
    voices: Sequence[MakeVoice],
    *,
    title: str,
    workers: int | None = None,
    max_seconds: float = 600.0,
    max_faults: int = 0,
    journal: Journal | None = None,
) -> list[list[Spoken]]:
    """Write the file of each reading (FLAC, 16 bits); what became of them, shard by shard.

    Args:
        shards: the work. Their number and order decide nothing but the progress.
        voices: makers of the voices that the readings number.
        title: what the progress bar calls it.
        workers: shards spoken at once; None = one for each processor core.
        max_seconds: longer speech is a fault.
        max_faults: readings that may fail.
        journal: where finished shards are noted, and found again. A shard with faults is tried again.

    Raises:
        DataError: more readings failed than may; it says why the first did.
        NetworkError: a voice's server cannot be reached.
    """
    work = _Work(voices, max_seconds, max_faults, sum(len(shard.jobs) for shard in shards), journal)
    found = [work.find(number, shard) for number, shard in enumerate(shards)]
    with _progress(title, work.total) as advance:
        advance(sum(map(len, filter(None, found))))
        with ThreadPoolExecutor(max_workers=workers or num_cores()) as pool:
            futures = {
                number: pool.submit(work.speak, number, shard, advance)
                for number, shard in enumerate(shards)
                if found[number] is None
            }
            try:
                return [futures[number].result() if spoken is None else spoken for number, spoken in enumerate(found)]
            except BaseException:
                work.stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def num_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class _Work:
    """What the threads share."""

    voices: Sequence[MakeVoice]
    max_seconds: float
    max_faults: int
    total: int
    journal: Journal | None
    stopped: threading.Event = field(default_factory=threading.Event)
    faults: list[str] = field(default_factory=list)

    def find(self, number: int, shard: Shard) -> list[Spoken] | None:
        """A finished shard, when all of its files are there: a reading that failed has none, and is tried again."""
        seconds = self.journal.get(KIND, number) if self.journal else None
        if seconds is None or not all(path.is_file() for _, path in shard.jobs):
            return None
        return [Spoken(value) for value in seconds]

    def speak(self, number: int, shard: Shard, advance: Callable[[int], None]) -> list[Spoken]:
        """Speak a shard to its end, or until another thread has failed."""
        try:
            return self._speak_shard(number, shard, advance)
        except BaseException:
            self.stopped.set()
            raise

    def _speak_shard(self, number: int, shard: Shard, advance: Callable[[int], None]) -> list[Spoken]:
        voices: dict[int, Voice] = {}
        spoken: list[Spoken] = []
        for reading, path in shard.jobs:
            if self.stopped.is_set():
                return spoken
            if reading.voice not in voices:
                voices[reading.voice] = self.voices[reading.voice](shard.seed)
            spoken.append(self._speak(voices[reading.voice], reading, path))
            advance(1)
        if self.journal:
            self.journal.add(KIND, number, [one.seconds for one in spoken])
        return spoken

    def _speak(self, voice: Voice, reading: Reading, path: Path) -> Spoken:
        import soundfile

        try:
            waveform = speak_reading(voice, reading, self.max_seconds)
        except (AudioError, DataError, RefusedRequest) as error:
            self.faults.append(str(error))
            if len(self.faults) > self.max_faults:
                raise DataError(
                    f"{len(self.faults)} of {self.total} readings failed, more than the {self.max_faults} that may; "
                    f"the first: {self.faults[0]}"
                ) from error
            path.unlink(missing_ok=True)  # of a try before it
            return Spoken(0.0, str(error))
        buffer = io.BytesIO()
        soundfile.write(buffer, waveform, SAMPLE_RATE, subtype="PCM_16", format="FLAC")
        atomic_write(path, buffer.getvalue())
        return Spoken(len(waveform) / SAMPLE_RATE)


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda count: progress.advance(task, count)
