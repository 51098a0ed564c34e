"""The texts of ``synthetic-en`` and ``spoken-requests-en``: pure functions of a seed and of the held-out texts."""

import itertools
import random
from collections.abc import Iterator

from ultravox.data.splits import HeldoutFilter, normalise_text
from ultravox.data.texts.grammar import LeastUsed, fill, parse_lists, read_yaml, slots, vocabulary

MAX_TRIES = 20


def transcription_texts(seed: int, allowed: HeldoutFilter) -> Iterator[str]:
    """Endless distinct sentences, from groups of templates in turn, each word of the lists used as evenly as possible.

    Sentences that the filter refuses are skipped. A longer run begins with the shorter one's sentences.
    """
    generator = random.Random(seed)
    groups = read_yaml("templates.yaml")
    turns = [name for name, group in groups.items() for _ in range(group["weight"])]
    templates = {name: itertools.cycle(_shuffled(group["texts"], generator)) for name, group in groups.items()}
    words = LeastUsed(vocabulary(), generator)
    seen: set[str] = set()
    while True:
        generator.shuffle(turns)
        for name in turns:
            for _ in range(MAX_TRIES):
                text = _draw(next(templates[name]), words, allowed, seen)
                if text is not None:
                    yield text
                    break


def _draw(template: str, words: LeastUsed, allowed: HeldoutFilter, seen: set[str]) -> str | None:
    entries: list[str] = []
    for name in slots(template):
        entries.append(words.pick(name, entries))
    text = fill(template, entries)
    normalised = normalise_text(text)
    if not normalised or normalised in seen or not allowed.allows(text):
        return None
    seen.add(normalised)
    words.said(text)
    return text


def _shuffled(items: list[str], generator: random.Random) -> list[str]:
    return generator.sample(items, len(items))


def request_texts(seed: int, allowed: HeldoutFilter) -> list[str]:
    """Distinct short requests, a fixed number from each group of templates, in random order."""
    generator = random.Random(seed)
    content = read_yaml("requests.yaml")
    lists = vocabulary() | parse_lists(content["lists"])
    texts: dict[str, str] = {}
    for group in content["groups"]:
        candidates = [
            fill(template, entries)
            for template in group["texts"]
            for entries in itertools.product(*(lists[name] for name in slots(template)))
        ]
        chosen = [text for text in _shuffled(candidates, generator) if allowed.allows(text)][: group["take"]]
        texts |= {normalise_text(text): text for text in chosen}
    return _shuffled(list(texts.values()), generator)
