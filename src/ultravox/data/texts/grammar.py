"""Templates with slots: ``{animals}``, ``{a:animals}`` (with an article), ``{pl:…}``, ``{ed:…}``, ``{ing:…}``."""

import heapq
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from ultravox.data.splits import normalise_text

SLOT = re.compile(r"\{(?:(?P<form>\w+):)?(?P<name>\w+)\}")
VOWELS = "aeiou"


def read_text(name: str) -> str:
    """The content of a file of this package."""
    return (files(__package__) / name).read_text(encoding="utf-8")


def read_yaml(name: str) -> Any:
    """The parsed content of a YAML file of this package."""
    return yaml.safe_load(read_text(name))


def parse_lists(content: Mapping[str, Any]) -> dict[str, list[str]]:
    """Lists of entries from strings of words: spaces separate entries, an underscore is a space inside one."""
    return {name: list(dict.fromkeys(str(words).split())) for name, words in content.items()}


@cache
def vocabulary() -> dict[str, list[str]]:
    """All word lists, with the common English words (most common first) as ``common``."""
    lists = parse_lists(read_yaml("vocabulary.yaml"))
    lists["common"] = [line for line in read_text("common_words.txt").splitlines() if not line.startswith("#")]
    return lists


def plural(noun: str) -> str:
    """The regular English plural of the last word; words without one are kept."""
    if noun in {"sheep", "fish", "deer", "salmon", "moose", "shrimp", "rice", "corn", "news"} or noun.endswith("s"):
        return noun
    if noun.endswith("man"):
        return noun[:-3] + "men"
    irregular = {"mouse": "mice", "goose": "geese", "tooth": "teeth", "foot": "feet", "child": "children"}
    return irregular.get(noun) or _third_person(noun)


def _third_person(word: str) -> str:
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2] not in VOWELS:
        return word[:-1] + "ies"
    return word + "s"


def inflect(entry: str, form: str) -> str:
    """A form of a verb entry: ``ed``, ``ing``, ``s`` or the bare verb. vocabulary.yaml says how verbs are written."""
    entry, _, past = entry.partition("/")
    verb, _, particle = entry.partition("_")
    doubled = verb.endswith("+")
    verb = verb.rstrip("+")
    stem = verb + verb[-1] if doubled else verb
    if form == "ing":
        word = (verb[:-1] if verb.endswith("e") and not verb.endswith(("ee", "oe")) else stem) + "ing"
        word = word.replace("diing", "dying").replace("tiing", "tying").replace("liing", "lying")
    elif form == "ed":
        regular = verb[:-1] + "ied" if verb.endswith("y") and verb[-2] not in VOWELS else stem + "ed"
        word = IRREGULAR_PARTICLES.get(verb) or past or (verb + "d" if verb.endswith("e") else regular)
    elif form == "s":
        word = _third_person(verb)
    else:
        word = verb
    return f"{word} {particle}".replace("_", " ").strip()


IRREGULAR_PARTICLES = {"hang": "hung", "shut": "shut"}


def with_article(noun: str) -> str:
    """``a`` or ``an`` before a word, by its first sound as far as spelling tells."""
    an = noun[0].lower() in VOWELS and not noun.lower().startswith(("uni", "us", "eu", "one"))
    return f"{'an' if an or noun.lower().startswith(('hour', 'honest')) else 'a'} {noun}"


def render_entry(entry: str, form: str | None) -> str:
    """An entry as it stands in a sentence."""
    text = inflect(entry, form or "") if "/" in entry or "+" in entry or form in {"ed", "ing", "s"} else entry
    text = text.replace("_", " ")
    if form == "pl":
        return plural(text)
    return with_article(text) if form == "a" else text


def slots(template: str) -> list[str]:
    """The list names of a template's slots, in order."""
    return [match["name"] for match in SLOT.finditer(template)]


def fill(template: str, entries: Sequence[str]) -> str:
    """The sentence with its slots filled in order, its first letter capital."""
    remaining = iter(entries)
    text = SLOT.sub(lambda match: render_entry(next(remaining), match["form"]), template)
    return text[0].upper() + text[1:]


class LeastUsed:
    """Picks, from each list, an entry whose words were said least so far, so that every word gets its turn.

    ``common`` is walked from its most common word on; the other lists are in a random order.
    """

    def __init__(self, lists: Mapping[str, Sequence[str]], generator: random.Random) -> None:
        self.counts: Counter[str] = Counter()
        self._heaps: dict[str, list[tuple[int, int, str]]] = {}
        for name in sorted(lists):
            entries = list(lists[name])
            if name != "common":
                generator.shuffle(entries)
            self._heaps[name] = [(0, order, entry) for order, entry in enumerate(entries)]

    def pick(self, name: str, taken: Sequence[str] = ()) -> str:
        """The entry of a list with the least-used word, not one of ``taken`` where there is a choice."""
        heap = self._heaps[name]
        aside = []
        while True:
            count, order, entry = heapq.heappop(heap)
            if (now := self._uses(entry)) > count:  # other lists, and the templates, say its words too
                heapq.heappush(heap, (now, order, entry))
            elif entry in taken and heap:
                aside.append((count, order, entry))
            else:
                break
        # It goes back to the end of its equals: picked but refused entries must not be picked again at once.
        self._turns += 1
        for item in [*aside, (count, self._turns, entry)]:
            heapq.heappush(heap, item)
        return entry

    _turns = 1_000_000

    def said(self, text: str) -> None:
        """Count the words of a sentence that is used."""
        self.counts.update(normalise_text(text).split())

    def _uses(self, entry: str) -> int:
        return min((self.counts[word] for word in normalise_text(render_entry(entry, None)).split()), default=0)
