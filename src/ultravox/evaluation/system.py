"""What is measured, as plain functions from batches to texts: a checkpoint, or a fake in a test."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ultravox.evaluation.token_view import TokenView

FromAudio = Callable[[list[np.ndarray]], list[str]]
FromText = Callable[[list[str]], list[str]]


@dataclass(slots=True)
class System:
    """The functions that an evaluation calls, each on one batch of waveforms [sample] or texts.

    A function that is None is reported as absent, with the reason in ``absent`` under the field's name.
    """

    transcribe: FromAudio
    transcribe_one: FromAudio | None = None
    """The same, one clip at a time: shows whether batching changes the texts."""
    answer: FromAudio | None = None
    transcribe_text: FromText | None = None
    answer_text: FromText | None = None
    recognise: FromAudio | None = None
    """The encoder's own recogniser."""
    view_tokens: Callable[[np.ndarray], TokenView] | None = None
    prompt: str = ""
    transcript_limit: dict[str, float] | None = None
    """Where ``transcribe`` stops by itself: ``extra_tokens`` and ``tokens_per_second`` of audio; None = nowhere."""
    text_method: str = ""
    """How ``transcribe_text`` puts its text to the model."""
    absent: dict[str, str] = field(default_factory=dict)

    def reason(self, name: str) -> str:
        """Why a function is None."""
        return self.absent.get(name, "this system does not offer it")


Progress = Callable[[str, int, int], None]


def no_progress(task: str, done: int, total: int) -> None:
    """The progress of a caller who does not watch."""


def in_batches(
    function: Callable[[list], list[str]],
    items: Sequence,
    *,
    batch_size: int,
    cost: Sequence[float] | None = None,
    load: Callable = lambda item: item,
    task: str = "",
    progress: Progress = no_progress,
) -> list[str]:
    """Apply a batched function to all items, those of like cost together, and give the results in the items' order.

    Args:
        cost: what makes an item long (seconds, characters); longest first, so that memory peaks at once.
        load: turns an item into what the function takes, only when its batch comes.
    """
    order = sorted(range(len(items)), key=lambda i: -cost[i]) if cost is not None else list(range(len(items)))
    results = [""] * len(items)
    progress(task, 0, len(items))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        texts = function([load(items[index]) for index in batch])
        if len(texts) != len(batch):
            raise ValueError(f"{task}: {len(batch)} items went in, {len(texts)} texts came out")
        for index, text in zip(batch, texts, strict=True):
            results[index] = text.strip()
        progress(task, start + len(batch), len(items))
    return results
