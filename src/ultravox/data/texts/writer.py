"""Texts written by a language model: one prompt for each, with a word of its own, so that no two are alike."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ultravox.data.journal import Journal
from ultravox.data.texts.grammar import vocabulary
from ultravox.data.texts.items import SpokenText, digest
from ultravox.errors import DataError

KIND = "written"  # of these parts in a journal
BATCH = 64  # prompts between two notes in the journal
TRIES_PER_TEXT = 5
PROMPT_VERSION = 1  # counts up when the prompt changes
NUM_COMMON = 200  # the most common words ("the", "of") say nothing about what to write
QUOTES = "\"'“”‘’„«»*` "

Write = Callable[[Sequence[str], int], Sequence[str]]
"""Prompts, and the number of the first one (a seed), to texts."""


@dataclass(frozen=True)
class WrittenTexts:
    """What a language model writes.

    Args:
        write: the model; it gives one text for each prompt.
        model: its name.
        num_texts: how many will be taken; five times as many prompts are tried.
        topic: what the texts are about; empty = anything.
        instructions: what the texts are and how they sound, in place of "one sentence that somebody might say aloud".
        language: in which language; empty = English.
        seed: of the words in the prompts.
        where: further settings that name the model, such as its server.
    """

    write: Write
    model: str
    num_texts: int
    topic: str = ""
    instructions: str = ""
    language: str = ""
    seed: int = 0
    where: str = ""
    costly = True

    def settings(self) -> dict[str, Any]:
        """See ``TextSource``."""
        named = {"writer": self.model, "where": self.where, "prompt": self.prompt("…"), "version": PROMPT_VERSION}
        return {**named, "num_texts": self.num_texts, "seed": self.seed}

    def prompt(self, word: str) -> str:
        """The request for one text."""
        wish = self.instructions or "Write one short sentence that somebody might say aloud."
        parts = [wish.rstrip()]
        if self.topic:
            parts.append(f"It is about {self.topic}.")
        if self.language:
            parts.append(f"It is in the language {self.language}.")
        return " ".join([*parts, f'It has to do with the word "{word}".', "Write nothing else."])

    def texts(self, journal: Journal | None) -> Iterator[SpokenText]:
        """See ``TextSource``. DataError when the model does not give one text for each prompt."""
        assert journal is not None, "what a language model writes is kept"
        words = vocabulary()["common"][NUM_COMMON:]
        generator = random.Random(self.seed)
        size = min(BATCH, self.num_texts)
        for part in range(-(-self.num_texts * TRIES_PER_TEXT // size)):
            prompts = [self.prompt(word) for word in generator.sample(words, size)]
            written = journal.get(KIND, part)
            if written is None:
                written = list(self.write(prompts, self.seed + part * size))
                if len(written) != size:
                    raise DataError(f"{self.model} wrote {len(written)} texts for {size} prompts: expected one each")
                journal.add(KIND, part, written)
            for prompt, text in zip(prompts, written, strict=True):
                source = f"{self.model}, prompt {digest(prompt)}"
                yield SpokenText(clean(text), source, language=self.language)


def clean(text: str) -> str:
    """A model's text without the quotation marks and line breaks that it puts around a sentence."""
    lines = [line.strip(QUOTES) for line in text.splitlines()]
    return next((line for line in lines if line), "")
