"""From places in the plan to what a step computes on. It runs in the loader's thread or processes, without weights."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ultravox.audio.effects import WaveformAugmenter, generator_for_sample, length_bounds
from ultravox.audio.endpoints import ClipCutter
from ultravox.audio.lengths import SAMPLE_RATE, num_audio_tokens
from ultravox.audio.waveform import change_speed
from ultravox.data.collate import pad_frames
from ultravox.data.examples import TokenisedExample
from ultravox.data.order import PlannedBatch
from ultravox.data.quarantine import audio_fault
from ultravox.data.stream_order import StreamedBatch
from ultravox.errors import AudioError, DataError
from ultravox.training.examples import Example, Lengths, Version
from ultravox.training.features import Features
from ultravox.training.rows import load_within, source_place


@dataclass(slots=True)
class SpeechBatch:
    """Rows at a speed and with a prompt each, and what the encoder needs of their recordings, or gave of them."""

    ids: list[str]
    uids: list[str]
    sources: list[int]
    input_ids: list[np.ndarray]
    """Conversations with one placeholder per recording, each [token]."""
    supervised: list[np.ndarray]
    """True on what the assistant says, each [token]."""
    transcripts: list[np.ndarray]
    """Tokens of each row's text alone, [token]."""
    audio_tokens: list[list[int]]
    """Language model positions of each recording of each row."""
    num_windows: list[int]
    """Of each row."""
    values: Tensor
    """[window, step, channel]; no window where no row has a recording."""
    lengths: Tensor
    """[window]."""
    encoded: bool
    """Whether `values` are frames of a frozen encoder."""
    seconds: list[float]
    """Of each row's audio."""
    faults: list[tuple[str, str]]
    """Reason and name of the recordings that could not be decoded, and of a stream's rows that gave no example."""
    epoch: int = 0
    augment_seed: tuple[int | str, ...] = ()
    num_rows: int = 0
    """Of a stream: rows that were looked at for this batch and those after it; 0 unless a window begins here."""
    copies: list[int] = field(default_factory=list)
    """How often each row came before; of a stream, the epoch of that row's stream."""
    as_text: list[TokenisedExample] = field(default_factory=list)
    """Each row's conversation as a teacher reads it; empty where there is none."""
    whole: list[bool] = field(default_factory=list)
    """Whether each row's clip was left whole; empty where none is cut."""

    @property
    def audio_seconds(self) -> float:
        """Of all rows."""
        return sum(self.seconds)

    def pin_memory(self) -> "SpeechBatch":
        """The same with its tensors in pinned memory, from where they travel faster to a GPU."""
        return replace(self, values=self.values.pin_memory(), lengths=self.lengths.pin_memory())

    def halves(self) -> "list[SpeechBatch]":
        """The first and the second half of the rows, each without the other's padding.

        Augmentation of frames is drawn anew for each half.
        """
        middle = len(self.ids) // 2
        cut = sum(self.num_windows[:middle])
        parts = [(slice(middle), slice(cut)), (slice(middle, None), slice(cut, None))]
        return [self._part(rows, windows, number) for number, (rows, windows) in enumerate(parts)]

    def with_positions(self, planned: list[int], found: list[int]) -> "SpeechBatch":
        """The same where each window has other positions than were planned: those that were found, [window].

        Raises:
            DataError: the planned ones are not those of the recordings.
        """
        windows = zip(planned, found, strict=True)
        audio_tokens = []
        for name, row in zip(self.ids, self.audio_tokens, strict=True):
            counts = []
            for expected in row:
                of_recording, count = 0, 0
                while of_recording < expected:
                    of_window, now = next(windows, (0, 0))
                    if not of_window:
                        break
                    of_recording, count = of_recording + of_window, count + now
                if of_recording != expected:
                    raise DataError(
                        f"{name} has a recording of {expected} positions, but its windows have {of_recording}: the "
                        "collator and the model count positions by different rules"
                    )
                counts.append(count)
            audio_tokens.append(counts)
        return replace(self, audio_tokens=audio_tokens)

    def _part(self, rows: slice, windows: slice, number: int) -> "SpeechBatch":
        lengths = self.lengths[windows]
        return SpeechBatch(
            self.ids[rows],
            self.uids[rows],
            self.sources[rows],
            self.input_ids[rows],
            self.supervised[rows],
            self.transcripts[rows],
            self.audio_tokens[rows],
            self.num_windows[rows],
            self.values[windows, : int(lengths.max())] if len(lengths) else self.values[windows],
            lengths,
            self.encoded,
            self.seconds[rows],
            [],
            self.epoch,
            (*self.augment_seed, number),
            as_text=self.as_text[rows],
            whole=self.whole[rows],
        )


Choice = tuple[Example, int, int]
"""An example, its version, its prompt."""


class BatchMaker:
    """Makes batches of some examples: from the cache, or from the recordings, augmented if wanted."""

    def __init__(
        self,
        examples: Sequence[Example],
        features: Features,
        stack_factor: int,
        *,
        from_cache: bool,
        audio_limits: tuple[float, float],
        augmenter: WaveformAugmenter | None = None,
        seed: int = 0,
    ) -> None:
        self.examples, self.features, self.stack_factor = examples, features, stack_factor
        self.from_cache, self.audio_limits = from_cache, audio_limits
        self.augmenter, self.seed = augmenter, seed
        self.encoded = from_cache and not features.trains
        """Whether windows are the frames of a frozen encoder."""
        self.cutter: ClipCutter | None = None
        """Cuts clips short, where that is learnt from."""
        self.with_text = False
        """Whether batches also hold what a teacher reads."""

    def planned(self, batch: PlannedBatch, epoch: int) -> SpeechBatch:
        """The batch of a plan. Its augmentation is a pure function of the seed, the epoch and each example."""
        streamed = batch if isinstance(batch, StreamedBatch) else None
        examples = self.examples if streamed is None else streamed.examples
        chosen = [examples[row] for row in batch.rows.tolist()]
        choices = list(zip(chosen, batch.versions.tolist(), batch.prompts.tolist(), strict=True))
        made = self._make(choices, epoch if streamed is None else streamed.epoch, batch.copies.tolist())
        if streamed is not None:
            made.faults[:0], made.num_rows = streamed.left_out, streamed.num_rows
        return made

    def first(self) -> SpeechBatch:
        """All examples at their first speed, with their first prompt."""
        choices = [(example, 0, 0) for example in self.examples]
        return self._make(choices, 0, [0] * len(choices))

    def audio_tokens(self, frames: Sequence[int]) -> int:
        """Language model positions of a recording, from the encoder frames of its windows."""
        return sum(num_audio_tokens(count, self.stack_factor) for count in frames)

    def planned_tokens(self, lengths: Lengths) -> np.ndarray:
        """Positions that the plan counts for all recordings of each version, int32 [example, version].

        They are the most there can be, where speed varies.
        """
        if self.augmenter is None:
            return lengths.audio_tokens
        return self._at_speed(lengths, 1) + np.maximum(lengths.num_recordings - 1, 0)[:, None] * lengths.exists

    def fewest_tokens(self, lengths: Lengths) -> np.ndarray:
        """The same where it varies the other way: the fewest there can be."""
        return lengths.audio_tokens if self.augmenter is None else self._at_speed(lengths, 0)

    def _at_speed(self, lengths: Lengths, bound: int) -> np.ndarray:
        """Positions of the least (0) or the most (1) samples that augmentation leaves or makes."""
        assert self.augmenter is not None
        samples, where = np.unique(np.round(lengths.seconds * SAMPLE_RATE).astype(np.int64), return_inverse=True)
        speed = self.augmenter.settings.speed
        bounds = (length_bounds(count, speed)[bound] for count in samples.tolist())
        tokens = [self.audio_tokens(self.features.expected_frames(count)) for count in bounds]
        heard = lengths.exists & (lengths.num_recordings > 0)[:, None]
        return np.where(heard, np.array(tokens, dtype=np.int32)[where.reshape(heard.shape)], 0)

    def _make(self, choices: list[Choice], epoch: int, copies: list[int]) -> SpeechBatch:
        windows: list[np.ndarray] = []
        nothing = torch.zeros(0)
        made = SpeechBatch([], [], [], [], [], [], [], [], nothing, nothing, self.encoded, [], [], epoch)
        for (example, version_number, prompt), copy in zip(choices, copies, strict=True):
            version = example.versions[version_number]
            try:
                recordings, seconds, whole = self._recordings(example, version, epoch, copy)
            except AudioError as error:
                place = f" ({source_place(example.source)})" if example.source else ""
                made.faults.append((audio_fault(error, example.recordings[0]), example.id + place))
                continue
            made.ids.append(example.id)
            made.uids.append(example.uid)
            made.copies.append(copy)
            made.sources.append(example.source)
            made.input_ids.append(example.prompts[prompt][0])
            made.supervised.append(example.prompts[prompt][1])
            made.transcripts.append(example.transcript)
            if self.with_text:
                made.as_text.append(example.as_text[prompt])
            made.audio_tokens.append([self.audio_tokens(self.frames(recording)) for recording in recordings])
            made.num_windows.append(sum(map(len, recordings)))
            made.seconds.append(seconds)
            if self.cutter is not None:
                made.whole.append(whole)
            windows += [window for recording in recordings for window in recording]
        if windows:
            made.values, made.lengths = pad_frames(windows)
        return made

    def _recordings(
        self, example: Example, version: Version, epoch: int, copy: int
    ) -> tuple[list[list[np.ndarray]], float, bool]:
        """The windows of each recording, the seconds of all, and whether none was cut."""
        if self.from_cache:
            return [self.features.cached_windows([name]) for name in version.names], version.seconds, True
        found, seconds, whole = [], version.seconds, True
        for number, audio in enumerate(example.recordings):
            waveform = change_speed(load_within(audio, *self.audio_limits), version.speed)
            if self.augmenter is not None:
                name = f"{example.uid}/{number}"
                waveform = self.augmenter(waveform, generator_for_sample(self.seed, epoch, name, copy))
            if self.cutter is not None and len(example.recordings) == 1:
                generator = generator_for_sample(self.seed, epoch, f"{example.uid}/cut", copy)
                waveform, whole = self.cutter(waveform, generator)
                seconds = len(waveform) / SAMPLE_RATE
            found.append(self.features.heard(waveform))
        return found, seconds, whole

    def frames(self, recording: list[np.ndarray]) -> list[int]:
        """Encoder frames of each window."""
        steps = [len(window) for window in recording]
        return steps if self.encoded else self.features.encoder.frame_lengths(torch.tensor(steps)).tolist()
