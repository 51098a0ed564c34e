"""From rows to tokens, by a source's templates: one by one for training, all at once for planning."""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from jinja2 import TemplateError

from ultravox.data.manifest import Clip
from ultravox.data.prompts import Message, Stretch, encode_all, encode_stretches, stretches
from ultravox.data.templates import INJECTED, PromptTemplate, UnusableRow, miscounted
from ultravox.tokens import AUDIO_TOKEN

#: Rows whose texts are tokenised in one go: enough to keep every core busy, little memory.
CHUNK_ROWS = 4096


class TokenisedExample(NamedTuple):
    """One dialogue with one placeholder for each of its recordings."""

    input_ids: np.ndarray
    """int64 [token]."""
    supervised: np.ndarray
    """True on what the assistant says, its end tokens included, bool [token]."""


def tokenise(
    clip: Clip, template: PromptTemplate, prompt_index: int, tokenizer: Any, audio_token_id: int
) -> TokenisedExample:
    """One row with one of its source's phrasings.

    Raises:
        UnusableRow: nothing to learn from, a text with a special token in it, other placeholders than recordings, or
            turns that the chat template refuses.
        DataError: a chat template that rewrites earlier turns.
    """
    ids, supervised = encode_stretches(tokenizer, _stretches(clip, template, prompt_index, tokenizer))
    input_ids = np.asarray(ids, dtype=np.int64)
    heard, placeholders = len(template.recordings(clip)), int((input_ids == audio_token_id).sum())
    if placeholders != heard:  # a tokenizer in which the placeholder is not one token
        raise miscounted(clip, heard, placeholders)
    return TokenisedExample(input_ids, np.asarray(supervised, dtype=bool))


def tokenise_as_text(clip: Clip, template: PromptTemplate, prompt_index: int, tokenizer: Any) -> TokenisedExample:
    """The same dialogue with the recording's text where the recording is heard: what a teacher reads.

    UnusableRow as in `tokenise`.
    """
    messages = _checked(template.messages(clip, prompt_index), clip, tokenizer)
    read = [{**message, "content": _with_text(message["content"], clip.text)} for message in messages]
    ids, supervised = encode_stretches(tokenizer, stretches(tokenizer, read))
    return TokenisedExample(np.asarray(ids, dtype=np.int64), np.asarray(supervised, dtype=bool))


def _with_text(content: str, text: str) -> str:
    """A turn with the text in its recording's place, on a line of its own."""
    before, placeholder, after = content.partition(AUDIO_TOKEN)
    if not placeholder:
        return content
    return "\n".join(part for part in (before.strip(), text.strip(), after.strip()) if part)


def token_counts(
    tokenizer: Any,
    template: PromptTemplate,
    clips: Sequence[Clip],
    on_unusable: Callable[[UnusableRow, int], None] | None = None,
) -> np.ndarray:
    """Tokens of each row with each phrasing, without its placeholders, int32 [row, prompt].

    `on_unusable` is told of each row that `tokenise` would refuse, and its number; such a row counts 0. Without it,
    the first one is raised.
    """
    counts = np.zeros((len(clips), template.num_prompts), dtype=np.int32)
    heard = np.full(len(clips), -1)
    fixed = template.fixed_prompts
    computed = [prompt for prompt in range(template.num_prompts) if prompt not in fixed[1:]]
    for start in range(0, len(clips), CHUNK_ROWS):
        numbers: dict[str, int] = {}  # of each different text
        texts: list[int] = []
        cells: list[int] = []  # which (row, prompt) each text belongs to
        for row, clip in enumerate(clips[start : start + CHUNK_ROWS], start=start):
            try:
                found = [_stretches(clip, template, prompt, tokenizer) for prompt in computed]
            except UnusableRow as error:
                if on_unusable is None:
                    raise error.at(row) from error
                on_unusable(error.at(row), row)
                continue
            heard[row] = len(template.recordings(clip))
            for prompt, dialogue in zip(computed, found, strict=True):
                for text, _ in dialogue:
                    texts.append(numbers.setdefault(text, len(numbers)))
                    cells.append(row * template.num_prompts + prompt)
        lengths = np.fromiter(map(len, encode_all(tokenizer, list(numbers))), dtype=np.int32, count=len(numbers))
        np.add.at(counts.reshape(-1), cells, lengths[texts])
    for number in np.unique(heard[heard >= 0]):
        rows = np.flatnonzero(heard == number)
        if len(fixed) > 1:  # phrasings of one text differ by as much in every row: only the first was tokenised in each
            prompts = [_stretches(clips[rows[0]], template, prompt, tokenizer)[0][0] for prompt in fixed]
            more = np.array([len(ids) for ids in encode_all(tokenizer, prompts)])
            counts[rows[:, None], fixed] = counts[rows][:, fixed[:1]] + (more - more[0])
        counts[rows] -= number
    return counts


def _stretches(clip: Clip, template: PromptTemplate, prompt_index: int, tokenizer: Any) -> list[Stretch]:
    """A row's texts with one phrasing."""
    messages = _checked(template.messages(clip, prompt_index), clip, tokenizer)
    try:
        return stretches(tokenizer, messages)
    except TemplateError as error:
        detail = f"turns that the chat template refuses ({error})"
        raise UnusableRow("with turns that the chat template refuses", clip.id, detail) from error


def _checked(messages: list[Message], clip: Clip, tokenizer: Any) -> list[Message]:
    """The same messages, with nothing in them that the tokenizer would take for the beginning or end of a turn."""
    special = special_tokens(tokenizer)
    for message in messages:
        if found := special.search(message["content"].replace(AUDIO_TOKEN, "")):
            raise UnusableRow(INJECTED, clip.id, f"{found[0]} as a text")
    return messages


def special_tokens(tokenizer: Any) -> re.Pattern[str]:
    """What a tokenizer reads as one special token, wherever it stands in a text."""
    return _special_tokens(tokenizer, len(tokenizer))


@lru_cache(maxsize=16)
def _special_tokens(tokenizer: Any, num_entries: int) -> re.Pattern[str]:
    """`num_entries` is the tokenizer's length: tokens may be added."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(map(re.escape, sorted({*added, *tokenizer.all_special_tokens}))))
