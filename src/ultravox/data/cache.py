"""Features of a frozen encoder, computed once and kept on disk.

A frozen encoder gives the same frames for the same clip in every epoch and every run, so they are worth keeping:
training then reads a slice of a memory-mapped file instead of running the encoder. The folder's name is a hash of all
that decides the numbers (weights, preprocessing, dtype), an entry's name one of the audio's bytes and the speed.
`cache_shards` has the files, `cache_folder` what concerns all keys together: locks, the size limit, clearing.
"""

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice

import numpy as np

from ultravox import __version__
from ultravox.audio.content import Audio
from ultravox.audio.waveform import SAMPLE_RATE, change_speed, load_waveform
from ultravox.data.audio_hashes import AudioHashes
from ultravox.data.cache_folder import HASHES_FILE, KEY_FILE, building, features_bytes, make_room, read_key_file
from ultravox.data.cache_reader import CachedFeatures, CacheKey
from ultravox.data.cache_shards import ENTRY, FORMAT_VERSION, Shard, ShardWriter, find_shards
from ultravox.data.plan import plan_batches
from ultravox.data.quarantine import Quarantine, audio_fault
from ultravox.errors import AudioError, DataError
from ultravox.files import atomic_write, explain_full_disk

__all__ = ["CacheKey", "CacheReport", "FeatureCache", "FeatureRequest", "SizeCap"]

#: Batches that are decoded while the encoder works on one, and threads for it; decoders leave Python's lock.
BATCHES_AHEAD = 2
NUM_DECODERS = min(8, os.cpu_count() or 1)

Encode = Callable[[list[np.ndarray]], list[np.ndarray]]
"""Waveforms, each [sample] at 16 kHz, to frames, each [frame, channel]."""


@dataclass(frozen=True, slots=True)
class FeatureRequest:
    """One clip at one speed. `seconds` (unstretched, from the manifest) groups clips of like length and sorts out those
    outside the length limits; where it is wrong, the audio itself is found out to be."""

    audio: Audio
    seconds: float
    speed: float = 1.0


@dataclass(frozen=True, slots=True)
class SizeCap:
    """How large the folder of all features may become."""

    max_bytes: int
    frames_per_second: float
    """That the encoder gives: so it is known beforehand how much room clips will take."""


@dataclass(slots=True)
class CacheReport:
    """What one build did. `names` are aligned with the requests; None = quarantined."""

    names: list[str | None]
    num_encoder_calls: int = 0
    num_encoded: int = 0
    num_bytes: int = 0
    """Of all features that were asked for, the cached ones included."""
    seconds: float = 0.0
    wait_seconds: float = 0.0
    """Of these, how long the encoder waited for decoded audio."""
    quarantine: Quarantine = field(default_factory=Quarantine)

    @property
    def quarantined(self) -> dict[str, list[str]]:
        """Reason → audio files."""
        return self.quarantine.reasons

    def require(self, max_share: float, num_clips: int) -> None:
        """See `Quarantine.require`."""
        self.quarantine.require(max_share, num_clips)


class FeatureCache(CachedFeatures):
    """Features of one key that are made where they are missing."""

    def build(
        self,
        requests: Sequence[FeatureRequest],
        encode: Encode,
        *,
        min_seconds: float = 0.0,
        max_seconds: float = 600.0,
        max_batch_seconds: float = 60.0,
        cap: SizeCap | None = None,
        on_progress: Callable[[float, float], None] | None = None,
    ) -> CacheReport:
        """Encode what is missing, in batches of like length, under a lock: a second builder waits, then finds it done.

        Args:
            requests: clips at speeds.
            encode: runs the encoder on one batch of waveforms.
            min_seconds, max_seconds: clips outside are quarantined, as are those that cannot be read.
            max_batch_seconds: audio in one batch, padding included.
            cap: what is least recently used makes room for what is new.
            on_progress: called with the seconds of audio done and in all.

        Raises:
            DataError: the encoder's frames do not fit the key, or what is needed does not fit below the cap.
        """
        begin = time.monotonic()
        report = CacheReport(names=[None] * len(requests))
        limits = (min_seconds, max_seconds)
        self._name(requests, limits, report)
        wanted = {name: request for name, request in zip(report.names, requests, strict=True) if name}
        if wanted:
            self._open(make=True)
            unnamed = read_key_file(self.folder) is None
            too_large = cap is not None and features_bytes() > cap.max_bytes
            if unnamed or too_large or not self._is_complete(list(wanted)):
                encoding = _Encoding(encode, limits, max_batch_seconds, report, on_progress)
                with building(self.folder):
                    self._extend(wanted, cap, encoding)
                self._open()
        self._judge(requests, limits, report)
        report.seconds = time.monotonic() - begin
        return report

    def _name(self, requests: Sequence[FeatureRequest], limits: tuple[float, float], report: CacheReport) -> None:
        """Give each clip the name of its entry, unless its manifest says that it is too short or too long."""
        inside = []
        for index, request in enumerate(requests):
            if reason := _outside(request.seconds * SAMPLE_RATE, *limits):  # a wrong manifest is found out on loading
                report.quarantine.add(reason, str(request.audio))
            else:
                inside.append(index)
        digests = AudioHashes(self.folder.parent / HASHES_FILE).find(requests[index].audio for index in inside)
        for index in inside:
            request = requests[index]
            if (digest := digests[request.audio]) is None:
                report.quarantine.add("missing audio", str(request.audio))
            else:
                report.names[index] = f"{digest}@{request.speed:g}"

    def _judge(self, requests: Sequence[FeatureRequest], limits: tuple[float, float], report: CacheReport) -> None:
        """Names only for what is there and inside the limits: what is cached may have been made with other ones."""
        named = [index for index, name in enumerate(report.names) if name]
        places = self._find([name for name in report.names if name])
        for index, place in zip(named, places.tolist(), strict=True):
            if place < 0:
                report.names[index] = None
            elif reason := _outside(int(self._entries["samples"][place]), *limits):
                report.quarantine.add(reason, str(requests[index].audio))
                report.names[index] = None
        places = np.unique(places[places >= 0])
        report.num_bytes = int(self._entries["rows"][places].sum(dtype=np.int64)) * self.key.row_bytes
        if os.access(self.folder, os.W_OK):
            for shard in np.unique(self._shard_of[places]):
                self._open_shards()[shard].touch()

    def _extend(self, wanted: dict[str, FeatureRequest], cap: SizeCap | None, encoding: "_Encoding") -> None:
        """Make what is missing. The folder's lock must be held."""
        number = 1 + max((shard.number for shard in find_shards(self.folder)), default=0)
        self._write_key_file()
        self._open()  # another builder may have been at work
        damaged = self._drop_damaged(list(wanted))
        self._open()
        missing = {
            name: r for (name, r), place in zip(wanted.items(), self._find(list(wanted)), strict=True) if place < 0
        }
        room = _Room(self, wanted, missing, cap)
        if cap is not None:
            room.make()
            self._open()
        if not missing:
            return
        last = find_shards(self.folder)[-1:]
        after = last[0] if last and last[0].number not in damaged else None
        with (
            explain_full_disk(self.folder),
            ShardWriter(self.folder, self.key.id, self.shard_bytes, after, number, room.take) as writer,
        ):
            for name, frames, num_samples in encoding.run(missing):
                writer.append(name, self._to_rows(name, frames), num_samples)

    def _drop_damaged(self, names: Sequence[str]) -> set[int]:
        """Forget the damaged entries of the last shard and of those that hold `names`; returns the numbers of such."""
        for leftover in self.folder.glob(".*"):  # of a write by one who was killed
            leftover.unlink(missing_ok=True)
        for shard in find_shards(self.folder):
            if shard.entries(self.key.id) is None:
                shard.remove()
        places = self._find(names)
        last = len(self._open_shards()) - 1
        used = np.union1d(self._shard_of[places[places >= 0]], [last] if last >= 0 else [])
        damaged = self._find_damaged(used.astype(int).tolist())
        for shard, whole in damaged:
            entries = shard.entries(self.key.id)
            if entries is not None and whole.any():
                shard.write_entries(self.key.id, entries[whole])
                shard.set_verified()
            else:
                shard.remove()
        return {shard.number for shard, _ in damaged}

    def _to_rows(self, name: str, frames: np.ndarray) -> np.ndarray:
        """Frames in the number type of the key; DataError when they do not fit."""
        if frames.ndim != 2 or frames.shape[1] != self.key.num_channels:
            raise DataError(f"the encoder gave {frames.shape}, expected [frame, {self.key.num_channels}]")
        with np.errstate(over="ignore"):
            rows = np.ascontiguousarray(frames, dtype=self.key.dtype)
        if not np.isfinite(rows).all():
            hint = "; try data.feature_dtype: float32" if np.isfinite(frames).all() else ""
            raise DataError(f"features of {name} are not finite in {self.key.dtype}{hint}")
        return rows

    def _write_key_file(self) -> None:
        """Say in words what the folder holds, for `ultravox data cache info`. The folder's lock must be held."""
        said = {"version": FORMAT_VERSION, "encoder": self.encoder, "key": asdict(self.key)}
        content = json.dumps({**said, "made_by": f"ultravox {__version__}"}, indent=2)
        atomic_write(self.folder / KEY_FILE, content + "\n")


class _Room:
    """Sees to it that a build stays below the cap: beforehand by the clips' lengths, then by what is written."""

    def __init__(
        self,
        cache: FeatureCache,
        wanted: Mapping[str, FeatureRequest],
        missing: Mapping[str, FeatureRequest],
        cap: SizeCap | None,
    ) -> None:
        self.cache, self.cap = cache, cap
        self.left = 0
        """Bytes that there is room for."""
        if cap is None:
            return
        places = cache._find([name for name in wanted if name not in missing])
        self.keep = {cache._open_shards()[index].number for index in np.unique(cache._shard_of[places]).tolist()}
        seconds = math.fsum(request.seconds / request.speed for request in missing.values())
        self.expected = len(missing) * ENTRY.itemsize + math.ceil(seconds * cap.frames_per_second) * cache.key.row_bytes
        needed = self.expected + int(cache._entries["rows"][places].sum(dtype=np.int64)) * cache.key.row_bytes
        if needed > cap.max_bytes:
            raise DataError(
                f"the features of this run take about {needed / 1e9:.3g} GB, more than data.max_cache_gb = "
                f"{cap.max_bytes / 1e9:g}: raise it (null = no limit), use fewer clips or speeds, or set data.cache "
                "to none"
            )

    def make(self) -> None:
        """Before the build: room for all that is missing."""
        if self.cap is not None and self.cache.held is not None:
            make_room(self.cap.max_bytes, self.expected, self.cache.folder, self.cache.held, self.keep)
            self.left = self.expected

    def take(self, num_bytes: int, shard: Shard) -> None:
        """Before each entry: the clips may be longer than was said, and then more has to go."""
        if self.cap is None or self.cache.held is None:
            return
        self.keep.add(shard.number)
        if num_bytes > self.left:
            more = max(num_bytes, self.expected // 10)
            make_room(self.cap.max_bytes, more, self.cache.folder, self.cache.held, self.keep)
            self.left = more
        self.left -= num_bytes


@dataclass(slots=True)
class _Encoding:
    """Decodes and encodes clips in batches of like length. Decoding runs ahead in threads: the encoder is to be fed."""

    encode: Encode
    limits: tuple[float, float]
    max_batch_seconds: float
    report: CacheReport
    on_progress: Callable[[float, float], None] | None

    def run(self, requests: dict[str, FeatureRequest]) -> Iterator[tuple[str, np.ndarray, int]]:
        """Name, frames [frame, channel] and samples at speed 1 of each clip that can be used."""
        names = list(requests)
        seconds = np.array([request.seconds / request.speed for request in requests.values()])
        milliseconds = np.maximum(1, seconds * 1000).astype(np.int64)
        budget = max(int(self.max_batch_seconds * 1000), int(milliseconds.max()))
        batches = plan_batches(milliseconds, budget, seed=0, epoch=0)
        done, total = 0.0, float(seconds.sum())
        for batch, loaded in self._decode(batches, [requests[name] for name in names]):
            usable = []
            for index, found in zip(batch, loaded, strict=True):
                audio = requests[names[index]].audio
                if isinstance(found, AudioError):
                    self.report.quarantine.add(audio_fault(found, audio), str(audio))
                else:
                    usable.append((names[index], *found))
            if usable:
                frames = self.encode([waveform for _, waveform, _ in usable])
                self.report.num_encoder_calls += 1
                for (name, _, num_samples), clip_frames in zip(usable, frames, strict=True):
                    yield name, clip_frames, num_samples
                    self.report.num_encoded += 1
            done += float(seconds[batch].sum())
            if self.on_progress:
                self.on_progress(done, total)

    def _decode(
        self, batches: list[np.ndarray], requests: list[FeatureRequest]
    ) -> Iterator[tuple[np.ndarray, list[tuple[np.ndarray, int] | AudioError]]]:
        """Waveforms of each batch in turn, with `BATCHES_AHEAD` more on their way."""
        with ThreadPoolExecutor(NUM_DECODERS) as pool:
            coming: deque[tuple[np.ndarray, list[Future]]] = deque()
            ahead = iter(batches)
            try:
                while True:
                    for batch in islice(ahead, 1 + BATCHES_AHEAD - len(coming)):
                        coming.append((batch, [pool.submit(_load, requests[index], *self.limits) for index in batch]))
                    if not coming:
                        return
                    batch, futures = coming.popleft()
                    begin = time.monotonic()
                    loaded = [future.result() for future in futures]
                    self.report.wait_seconds += time.monotonic() - begin
                    yield batch, loaded
            finally:
                pool.shutdown(cancel_futures=True)


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
