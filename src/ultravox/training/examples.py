"""The examples of a run: numbers about each in arrays, and each itself made when a batch asks for it.

A corpus of many millions of rows fits into memory this way. What a plan needs (tokens of each text under each prompt,
positions of each recording at each speed) takes some tens of bytes a row; tokens are made again when they are wanted,
and the last ones are kept.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, overload

import numpy as np

from ultravox.audio.content import Audio
from ultravox.audio.lengths import SAMPLE_RATE, num_audio_tokens
from ultravox.config.schema import RunConfig
from ultravox.data.clip import Clip
from ultravox.data.examples import TokenisedExample, special_tokens, tokenise, tokenise_as_text
from ultravox.data.fingerprint import uid
from ultravox.data.templates import INJECTED, PromptTemplate, UnusableRow
from ultravox.errors import DataError
from ultravox.metrics.normalize import is_said, spoken_form
from ultravox.training.features import Features

#: Examples that stay made: all of a small corpus, so that its tokens are made once.
KEPT_EXAMPLES = 1 << 15


@dataclass(slots=True)
class Version:
    """An example at one speed."""

    speed: float
    seconds: float
    """Of all its recordings."""
    frames: list[list[int]]
    """Encoder frames of each window of each recording."""
    names: list[str] = field(default_factory=list)
    """Entry of the cache for each recording; empty without a cache."""


class Prompts(Sequence[TokenisedExample]):
    """A row's conversation with each phrasing, tokenised when it is asked for: an epoch wants one of them."""

    def __init__(self, count: int, make: Callable[[int], TokenisedExample]) -> None:
        self._made: list[TokenisedExample | None] = [None] * count
        self._make = make

    def __reduce__(self) -> tuple[Any, ...]:  # a stream's examples travel to the loader's processes
        return list, (list(self),)

    def __len__(self) -> int:
        return len(self._made)

    @overload
    def __getitem__(self, number: int) -> TokenisedExample: ...
    @overload
    def __getitem__(self, number: slice) -> list[TokenisedExample]: ...
    def __getitem__(self, number: int | slice) -> TokenisedExample | list[TokenisedExample]:
        if isinstance(number, slice):
            return [self[index] for index in range(*number.indices(len(self)))]
        if (made := self._made[number]) is None:
            made = self._made[number] = self._make(number)
        return made


@dataclass(slots=True)
class Example:
    """One row of a source."""

    id: str
    uid: str
    source: int
    """Index in data.sources."""
    text: str
    recordings: list[Audio]
    prompts: Sequence[TokenisedExample]
    """For each prompt: the conversation with one placeholder per recording, and True on what the assistant says."""
    transcript: np.ndarray
    """Tokens of the text alone, [token]."""
    versions: list[Version] = field(default_factory=list)
    as_text: Sequence[TokenisedExample] = ()
    """For each prompt: the conversation as a teacher reads it; none where no stage has a teacher."""


def require_transcript(clip: Clip, template: PromptTemplate) -> None:
    """DataError when a row has no transcript, or several recordings, whose texts are not told apart."""
    heard = len(template.recordings(clip))
    if heard > 1:
        raise DataError(
            f"row {clip.id} has {heard} recordings and one text: the teacher of a distillation cannot read which is "
            "which; leave out this source, or set distillation.weight to 0"
        )
    if heard and not is_said(clip.text):
        raise DataError(
            f"row {clip.id} has no transcript, which the teacher of a distillation reads in place of the audio: give "
            "every row a text, filter these rows out, or set distillation.weight to 0"
        )


def has_teacher(config: RunConfig, source: str) -> bool:
    """Whether some stage of the run distils from what a source's rows say."""
    return any(
        stage.tune.distillation.weight > 0 and (stage.sources is None or source in stage.sources)
        for stage in config.stages
    )


class ExampleMaker:
    """Makes the examples of one source."""

    def __init__(self, source: int, template: PromptTemplate, processor: Any, config: RunConfig, name: str) -> None:
        """Args:
        source: its index in data.sources.
        template: of its prompts.
        processor: of the model.
        config: of the run.
        name: of the source with its fingerprint; the examples' uids are made from it.
        """
        self.source, self.template, self.name = source, template, name
        self._tokenizer, self._audio_token_id = processor.tokenizer, processor.audio_token_index
        self._spoken = config.data.transcript_style == "spoken"
        self._has_teacher = has_teacher(config, config.data.sources[source].name)

    def texts(self, clip: Clip) -> tuple[Clip, str]:
        """The clip with its text as it is to be written, and what is tokenised as the text alone.

        With a space in front, a word is the same token at the beginning as in the middle: CTC has fewer to tell apart.
        UnusableRow when a text is needed and there is none; DataError when a teacher cannot read the row.
        """
        is_text = is_said(clip.text)
        if not is_text and "text" in self.template.columns_needed:
            raise UnusableRow("without text", clip.id)
        if self._has_teacher:
            require_transcript(clip, self.template)
            if self.template.recordings(clip) and (found := special_tokens(self._tokenizer).search(clip.text)):
                raise UnusableRow(INJECTED, clip.id, f"{found[0]} as a text")
        styled = replace(clip, text=spoken_form(clip.text)) if self._spoken else clip
        return styled, f" {styled.text}" if is_text else ""

    def example(self, clip: Clip) -> Example:
        """The example of a row, without versions. UnusableRow when there can be none."""
        styled, alone = self.texts(clip)
        return Example(
            clip.id,
            uid(self.name, clip.id),
            self.source,
            clip.text,
            [audio for audio, _ in self.template.recordings(clip)],
            Prompts(self.template.num_prompts, lambda prompt: self.tokenise(styled, prompt)),
            np.asarray(self._tokenizer.encode(alone, add_special_tokens=False) if alone else [], dtype=np.int64),
            as_text=self._as_text(styled) if self._has_teacher else (),
        )

    def _as_text(self, styled: Clip) -> Prompts:
        def make(prompt: int) -> TokenisedExample:
            return tokenise_as_text(styled, self.template, prompt, self._tokenizer)

        return Prompts(self.template.num_prompts, make)

    def tokenise(self, styled: Clip, prompt: int) -> TokenisedExample:
        """A row's conversation. UnusableRow when there can be none."""
        return tokenise(styled, self.template, prompt, self._tokenizer, self._audio_token_id)


def make_version(features: Features, speed: float, seconds: Sequence[float], names: Sequence[str]) -> Version:
    """A row at one speed, from its recordings' seconds and their entries in the cache (none without a cache)."""
    if names:
        frames = [features.cached_frames(name) for name in names]
    else:
        frames = [features.expected_frames(round(duration / speed * SAMPLE_RATE)) for duration in seconds]
    return Version(speed, sum(seconds) / speed, frames, list(names))


def tokens_of(example: Example) -> list[str]:
    """An example's tokens, for the fingerprint of its source."""
    arrays = [example.transcript, *(array for prompt in example.prompts for array in prompt)]
    return [array.tobytes().hex() for array in arrays]


@dataclass(frozen=True, slots=True)
class Lengths:
    """What plans are made from."""

    text_tokens: np.ndarray
    """Under each prompt, without placeholders, int32 [example, prompt]; 0 = that prompt does not exist."""
    ctc_tokens: np.ndarray
    """Positions that the transcript needs at least, int32 [example]; 0 = there is none."""
    audio_tokens: np.ndarray
    """Positions of all recordings, int32 [example, version]; those that exist come first."""
    exists: np.ndarray
    """Whether there is such a version, bool [example, version]."""
    one_window: np.ndarray
    """Whether it is one recording of one window, bool [example, version]."""
    seconds: np.ndarray
    """Of all recordings, float64 [example, version]."""
    num_recordings: np.ndarray
    """int32 [example]"""

    def __len__(self) -> int:
        return len(self.ctc_tokens)

    def __getitem__(self, chosen: np.ndarray) -> "Lengths":
        return Lengths(*(getattr(self, entry.name)[chosen] for entry in fields(self)))


def join_lengths(parts: Sequence[Lengths]) -> Lengths:
    """The examples of all parts, one part behind the other."""
    joined = []
    for entry in fields(Lengths):
        arrays = [getattr(part, entry.name) for part in parts]
        if arrays[0].ndim == 2:
            width = max(array.shape[1] for array in arrays)
            arrays = [np.pad(array, ((0, 0), (0, width - array.shape[1]))) for array in arrays]
        joined.append(np.concatenate(arrays))
    return Lengths(*joined)


def lengths_of(examples: Sequence[Example], stack_factor: int) -> Lengths:
    """The lengths of examples that are made."""
    shape = (len(examples), max((len(example.versions) for example in examples), default=0))
    tokens, exists, one_window = (np.zeros(shape, dtype=kind) for kind in (np.int32, bool, bool))
    seconds = np.zeros(shape)
    text = np.zeros((len(examples), max((len(e.prompts) for e in examples), default=1)), dtype=np.int32)
    for row, example in enumerate(examples):
        text[row, : len(example.prompts)] = [len(ids) - len(example.recordings) for ids, _ in example.prompts]
        for place, version in enumerate(example.versions):
            tokens[row, place] = count_tokens(version, stack_factor)
            one_window[row, place] = is_one_window(version)
            exists[row, place], seconds[row, place] = True, version.seconds
    ctc = np.array([ctc_tokens(example.transcript) for example in examples], dtype=np.int32)
    recordings = np.array([len(example.recordings) for example in examples], dtype=np.int32)
    return Lengths(text, ctc, tokens, exists, one_window, seconds, recordings)


def count_tokens(version: Version, stack_factor: int) -> int:
    """Language model positions of all recordings."""
    return sum(num_audio_tokens(count, stack_factor) for windows in version.frames for count in windows)


def is_one_window(version: Version) -> bool:
    """Whether a version is one recording of one window."""
    return [*map(len, version.frames)] == [1]


def ctc_tokens(transcript: np.ndarray | Sequence[int]) -> int:
    """Positions that CTC needs for a transcript: one for each token, and a blank between equal neighbours."""
    return len(transcript) + int((np.diff(transcript) == 0).sum())


def unique_tokens(transcripts: Sequence[np.ndarray]) -> np.ndarray:
    """The tokens that occur in some transcripts, each once, in the order of their ids, int64 [token]."""
    return np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *transcripts]))


class ExampleTable(Sequence[Example]):
    """Some examples: their lengths, their sources, and each of them when it is asked for."""

    def __init__(
        self, make: Callable[[int], Example], lengths: Lengths, sources: np.ndarray, numbers: np.ndarray | None = None
    ) -> None:
        """Args:
        make: the example of a number.
        lengths: of the examples of this table.
        sources: index in data.sources, int [example].
        numbers: of the examples of this table, int [example]; None = 0, 1, 2 …
        """
        self._make, self.lengths, self.sources = make, lengths, sources
        self.numbers = np.arange(len(lengths), dtype=np.int32) if numbers is None else numbers

    @classmethod
    def of(cls, examples: Sequence[Example], stack_factor: int) -> "ExampleTable":
        """A table of examples that are made."""
        sources = np.array([example.source for example in examples], dtype=np.int32)
        return cls(examples.__getitem__, lengths_of(examples, stack_factor), sources)

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, row: int) -> Example: ...
    @overload
    def __getitem__(self, row: slice) -> list[Example]: ...
    def __getitem__(self, row: int | slice) -> Example | list[Example]:
        if isinstance(row, slice):
            return [self[index] for index in range(*row.indices(len(self)))]
        return self._make(int(self.numbers[row]))

    def __iter__(self) -> Iterator[Example]:
        return (self[row] for row in range(len(self)))

    def subset(self, chosen: np.ndarray) -> "ExampleTable":
        """Some of the examples, by a mask or by their rows; the table itself where the mask leaves none out."""
        if chosen.dtype == bool and chosen.all():
            return self
        return ExampleTable(self._make, self.lengths[chosen], self.sources[chosen], self.numbers[chosen])


class KeptExamples:
    """Examples by their number, of which the last are kept. Each has one place, so that no lock is needed."""

    def __init__(self, make: Callable[[int], Example]) -> None:
        self._make = make
        self._kept: dict[int, tuple[int, Example]] = {}

    def __call__(self, number: int) -> Example:
        """The example of a number."""
        found = self._kept.get(number % KEPT_EXAMPLES)
        if found is None or found[0] != number:
            found = self._kept[number % KEPT_EXAMPLES] = (number, self._make(number))
        return found[1]
