"""Features of a frozen encoder, computed once and kept on disk.

A frozen encoder gives the same frames for the same clip in every epoch and every run, so they are worth keeping:
training then reads a slice of a memory-mapped file instead of running the encoder. The folder's name is a hash of all
that decides the numbers (weights, preprocessing, dtype), an entry's name one of the audio file's bytes and the speed.

Folder, format version 1: ``shard.bin`` (rows of [frame, channel], appended only), ``index.json`` (rows of each entry, a
CRC-32 of them, and how many samples the clip has), ``lock``. A process killed in the middle leaves rows that no index
names; the next builder cuts them off.
"""

import fcntl
import hashlib
import json
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from ultravox.audio.content import Audio, audio_sha256
from ultravox.audio.waveform import SAMPLE_RATE, change_speed, load_waveform
from ultravox.data.plan import plan_batches
from ultravox.errors import AudioError, DataError
from ultravox.files import atomic_write, explain_full_disk, ultravox_home

FORMAT_VERSION = 1

#: A long build writes its index this often, so that an interrupted one goes on where it was.
SECONDS_BETWEEN_COMMITS = 30.0

#: Reasons for leaving a clip out that the configuration asks for.
LENGTH_LIMITS = ("too short", "too long")

Encode = Callable[[list[np.ndarray]], list[np.ndarray]]
"""Waveforms, each [sample] at 16 kHz, to frames, each [frame, channel]."""


@dataclass(frozen=True, slots=True)
class CacheKey:
    """All that decides the cached numbers, apart from the audio itself."""

    encoder_hash: str
    preprocessing: str
    num_channels: int
    dtype: str = "float16"

    def folder(self) -> Path:
        text = json.dumps({"format": FORMAT_VERSION, **asdict(self)}, sort_keys=True)
        return ultravox_home() / "features" / hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class FeatureRequest:
    """One clip at one speed. `seconds` (unstretched, from the manifest) groups clips of like length and sorts out those
    outside the length limits; where it is wrong, the audio itself is found out to be."""

    audio: Audio
    seconds: float
    speed: float = 1.0


@dataclass(slots=True)
class CacheReport:
    """What one build did. `names` are aligned with the requests; None = quarantined."""

    names: list[str | None]
    num_encoder_calls: int = 0
    num_encoded: int = 0
    seconds: float = 0.0
    quarantined: dict[str, list[str]] = field(default_factory=dict)
    """Reason → audio files."""

    def quarantine(self, reason: str, audio: Audio) -> None:
        files = self.quarantined.setdefault(reason, [])
        if str(audio) not in files:
            files.append(str(audio))

    def require(self, max_share: float, num_clips: int) -> None:
        """Raise a DataError when more than `max_share` of the clips are faulty; the length limits are no fault."""
        faults = {reason: files for reason, files in self.quarantined.items() if reason not in LENGTH_LIMITS}
        bad = sorted({file for files in faults.values() for file in files})
        if len(bad) > max_share * num_clips:
            reasons = ", ".join(f"{len(files)} {reason}" for reason, files in sorted(faults.items()))
            raise DataError(
                f"{len(bad)} of {num_clips} clips cannot be used ({reasons}), more than data.max_quarantine_share = "
                f"{max_share:g} allows; the first is {bad[0]}: repair or remove them, or raise the share"
            )


class FeatureCache:
    """Read and extend one cache folder. Frames come back as views of the memory-mapped file, without a copy."""

    def __init__(self, key: CacheKey, folder: Path | None = None) -> None:
        self.key = key
        self.folder = folder or key.folder()
        self._entries: dict[str, tuple[int, int, int]] = {}
        self._num_samples: dict[str, int] = {}  # of the clip at its own speed; older indexes do not tell
        self._rows = np.zeros((0, key.num_channels), dtype=key.dtype)
        self._good: set[str] = set()
        self._load()

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def num_frames(self, name: str) -> int:
        return self._entries[name][1]

    def frames(self, name: str) -> np.ndarray:
        """Frames of an entry, [frame, channel], read-only view of the file."""
        start, count, _ = self._entries[name]
        return self._rows[start : start + count]

    def build(
        self,
        requests: Sequence[FeatureRequest],
        encode: Encode,
        *,
        min_seconds: float = 0.0,
        max_seconds: float = 600.0,
        max_batch_seconds: float = 60.0,
        on_progress: Callable[[float, float], None] | None = None,
    ) -> CacheReport:
        """Encode what is missing, in batches of like length, under a lock: a second builder waits, then finds it done.

        Args:
            requests: clips at speeds.
            encode: runs the encoder on one batch of waveforms.
            min_seconds, max_seconds: clips outside are quarantined, as are those that cannot be read.
            max_batch_seconds: audio in one batch, padding included.
            on_progress: called with the seconds of audio done and in all.

        Raises:
            DataError: the encoder's frames do not fit the key.
        """
        begin = time.monotonic()
        report = CacheReport(names=[None] * len(requests))
        hashes: dict[Audio, str | None] = {}
        for index, request in enumerate(requests):
            # by its manifest; a wrong one is found out on loading
            if reason := _outside(request.seconds * SAMPLE_RATE, min_seconds, max_seconds):
                report.quarantine(reason, request.audio)
                continue
            if request.audio not in hashes:
                hashes[request.audio] = _digest(request.audio)
            if (digest := hashes[request.audio]) is None:
                report.quarantine("missing", request.audio)
            else:
                report.names[index] = f"{digest}@{request.speed:g}"
        if not all(name is None or self._is_good(name) for name in report.names):
            with self._lock():
                self._load()
                missing = {n: r for n, r in zip(report.names, requests, strict=True) if n and not self._is_good(n)}
                if missing:
                    limits = (min_seconds, max_seconds)
                    self._encode_missing(missing, encode, limits, max_batch_seconds, report, on_progress)
            report.names = [name if name and name in self else None for name in report.names]
        for index, name in enumerate(report.names):  # what is cached may have been made with other limits
            num_samples = self._num_samples.get(name) if name else None
            if num_samples and (reason := _outside(num_samples, min_seconds, max_seconds)):
                report.quarantine(reason, requests[index].audio)
                report.names[index] = None
        report.seconds = time.monotonic() - begin
        return report

    def _is_good(self, name: str) -> bool:
        """Whether the entry is there and its rows are what was written (checked once per process)."""
        if name in self._entries and name not in self._good:
            if zlib.crc32(np.ascontiguousarray(self.frames(name)).data) == self._entries[name][2]:
                self._good.add(name)
            else:
                del self._entries[name]
        return name in self._entries

    def _encode_missing(
        self,
        missing: dict[str, FeatureRequest],
        encode: Encode,
        limits: tuple[float, float],
        max_batch_seconds: float,
        report: CacheReport,
        on_progress: Callable[[float, float], None] | None,
    ) -> None:
        names = list(missing)
        seconds = np.array([missing[name].seconds / missing[name].speed for name in names])
        milliseconds = np.maximum(1, seconds * 1000).astype(np.int64)
        budget = max(int(max_batch_seconds * 1000), int(milliseconds.max()))
        batches = [[names[i] for i in batch] for batch in plan_batches(milliseconds, budget, seed=0, epoch=0)]

        def load(batch: list[str]) -> list[tuple[str, tuple[np.ndarray, int] | AudioError]]:
            return [(name, _load(missing[name], *limits)) for name in batch]

        done, total = 0.0, float(seconds.sum())
        length = dict(zip(names, seconds.tolist(), strict=True))
        with self._appending() as append, ThreadPoolExecutor(1) as pool:
            upcoming = pool.submit(load, batches[0])
            for index, batch in enumerate(batches):
                loaded = upcoming.result()
                if index + 1 < len(batches):
                    upcoming = pool.submit(load, batches[index + 1])
                for name, found in loaded:
                    if isinstance(found, AudioError):
                        report.quarantine(_reason(found, missing[name].audio), missing[name].audio)
                usable = [(name, *found) for name, found in loaded if not isinstance(found, AudioError)]
                if usable:
                    frames = encode([waveform for _, waveform, _ in usable])
                    report.num_encoder_calls += 1
                    for (name, _, num_samples), rows in zip(usable, frames, strict=True):
                        append(name, rows, num_samples)
                        report.num_encoded += 1
                done += sum(length[name] for name in batch)
                if on_progress:
                    on_progress(done, total)

    @contextmanager
    def _appending(self) -> Iterator[Callable[[str, np.ndarray, int], None]]:
        """Append rows behind those that the index names; the index follows, so it names only rows that are there.

        On an error, such as a full disk, the rows that no index names are cut off again.
        """
        num_rows = num_indexed = len(self._rows)
        last_commit = time.monotonic()
        row_bytes = self.key.num_channels * np.dtype(self.key.dtype).itemsize
        shard = self.folder / "shard.bin"

        def cut_off(error: type[BaseException] | None, *_: object) -> None:
            if error is not None and shard.is_file():
                os.truncate(shard, num_indexed * row_bytes)
                self._load()

        with explain_full_disk(shard), ExitStack() as stack:
            stack.push(cut_off)
            file = stack.enter_context(open(shard, "ab"))
            file.truncate(num_rows * row_bytes)

            def append(name: str, frames: np.ndarray, num_samples: int) -> None:
                nonlocal num_rows, num_indexed, last_commit
                if frames.ndim != 2 or frames.shape[1] != self.key.num_channels:
                    raise DataError(f"the encoder gave {frames.shape}, expected [frame, {self.key.num_channels}]")
                with np.errstate(over="ignore"):
                    rows = np.ascontiguousarray(frames, dtype=self.key.dtype)
                if not np.isfinite(rows).all():
                    hint = "; try data.feature_dtype: float32" if np.isfinite(frames).all() else ""
                    raise DataError(f"features of {name} are not finite in {self.key.dtype}{hint}")
                file.write(rows.data)
                self._entries[name] = (num_rows, len(rows), zlib.crc32(rows.data))
                self._num_samples[name] = num_samples
                self._good.add(name)
                num_rows += len(rows)
                if time.monotonic() - last_commit > SECONDS_BETWEEN_COMMITS:
                    file.flush()
                    self._write_index(num_rows)
                    num_indexed, last_commit = num_rows, time.monotonic()

            yield append
            file.flush()
            self._write_index(num_rows)
        self._load()

    def _write_index(self, num_rows: int) -> None:
        index = {"version": FORMAT_VERSION, "key": asdict(self.key), "num_rows": num_rows, "entries": self._entries}
        samples = [self._num_samples.get(name) for name in self._entries]
        atomic_write(self.folder / "index.json", json.dumps({**index, "num_samples": samples}))

    def _load(self) -> None:
        """Read the index and map the rows; entries beyond the file's end (a truncated copy) are forgotten."""
        shard, index = self.folder / "shard.bin", self.folder / "index.json"
        self._entries, self._num_samples, num_rows = {}, {}, 0
        try:
            content = json.loads(index.read_bytes())
            if content["version"] == FORMAT_VERSION and content["key"] == asdict(self.key):
                self._entries = {name: tuple(entry) for name, entry in content["entries"].items()}
                samples = zip(self._entries, content.get("num_samples", []), strict=False)
                self._num_samples = {name: count for name, count in samples if count is not None}
                num_rows = int(content["num_rows"])
        except (OSError, ValueError, KeyError, TypeError):
            self._entries = {}  # nothing there yet, or damaged: it is a cache, so build it again
        row_bytes = self.key.num_channels * np.dtype(self.key.dtype).itemsize
        there = shard.stat().st_size // row_bytes if shard.is_file() else 0
        num_rows = min(num_rows, there)
        self._entries = {name: entry for name, entry in self._entries.items() if entry[0] + entry[1] <= num_rows}
        self._good &= set(self._entries)
        shape = (num_rows, self.key.num_channels)
        self._rows = np.memmap(shard, self.key.dtype, "r", shape=shape) if num_rows else np.zeros(shape, self.key.dtype)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _digest(audio: Audio) -> str | None:
    """SHA-256 of the encoded audio, or None where there is none."""
    try:
        return audio_sha256(audio)
    except AudioError:
        return None


def _reason(error: AudioError, audio: Audio) -> str:
    """The kind of fault in a few words, to count by."""
    message = str(error).replace(str(audio), "")
    kinds = {
        "is too short": "too short",
        "no audio samples": "without samples",
        "not numbers": "with NaN or infinite samples",
        "truncated": "damaged or truncated",
        "0 bytes": "empty",
        " s or more: at most": "too long",
    }
    return next((kind for phrase, kind in kinds.items() if phrase in message), "not readable as audio")


def _outside(num_samples: float, min_seconds: float, max_seconds: float) -> str | None:
    """Which length limit a clip of `num_samples` is outside of, if any."""
    if num_samples < min_seconds * SAMPLE_RATE:
        return "too short"
    return "too long" if num_samples > max_seconds * SAMPLE_RATE + 1 else None  # + 1: resampling may add one


def _load(request: FeatureRequest, min_seconds: float, max_seconds: float) -> tuple[np.ndarray, int] | AudioError:
    """The waveform at its speed and how many samples it has at speed 1, or why it cannot be had."""
    try:
        waveform = load_waveform(request.audio, max_seconds=max_seconds)
    except AudioError as error:
        return error
    if len(waveform) < max(1, min_seconds * SAMPLE_RATE):
        return AudioError(f"{request.audio} is too short: {len(waveform)} samples, expected {min_seconds:g} s or more")
    return change_speed(waveform, request.speed), len(waveform)
