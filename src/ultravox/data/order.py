"""Which example, at which speed, under which prompt, is in which batch of which epoch: an endless order, without state.

An epoch is cut into windows of a few million places, and each window is planned on its own when it is asked for. So a
place in the order is three integers (epoch, window, batch), going on at any of them takes one window's planning, and a
corpus of 100 million rows needs no more memory than one window. Nothing here knows of ranks or workers: `rank_slice`
deals the one global order out.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ultravox.data.mixture import Mixture
from ultravox.data.permutation import mix, round_keys
from ultravox.data.plan import Batches, Limits, plan, require_budget, require_memory
from ultravox.errors import ConfigError, DataError

FORMAT_VERSION = 1  # of the algorithm: another order for the same arguments is another version
WINDOW_ROWS = 1 << 22
_WINDOW = 3  # what a plan is for, in its seed


class Position(NamedTuple):
    """A place in the order: the next batch of a window of an epoch. All count from 0."""

    epoch: int = 0
    window: int = 0
    batch: int = 0


@dataclass(frozen=True, slots=True)
class PlannedBatch:
    """What is in one batch; all [item]."""

    rows: np.ndarray
    versions: np.ndarray
    """Speed."""
    prompts: np.ndarray
    copies: np.ndarray
    """How often the row came before, over all epochs."""

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, slots=True)
class _Window:
    items: PlannedBatch
    batches: Batches


class DataOrder:
    """The batches of every epoch, as a pure function of its arguments.

    Each time that an example comes, it comes in the next of its versions and under the next of its prompts: it meets
    all of them in as few epochs as possible, and all pairs of them in the long run. Examples are out of step with one
    another.
    """

    def __init__(
        self,
        audio_tokens: np.ndarray,
        text_tokens: np.ndarray,
        mixture: Mixture,
        limits: Limits,
        *,
        seed: int,
        fingerprint: str = "",
        window_rows: int = WINDOW_ROWS,
    ) -> None:
        """Args:
        audio_tokens: of each version of each row, [row, version]; 0 = that version does not exist; a row of zeros is
            an example without audio.
        text_tokens: under each prompt, [row, prompt]; 0 = that prompt does not exist; a row of zeros is an example
            without text.
        mixture: what an epoch is made of; its rows are these rows.
        limits: of a batch.
        seed: of the run.
        fingerprint: of the data itself, so that the order's own tells other data of the same lengths apart.
        window_rows: places that are planned together.

        Raises:
            DataError: an example that has no length, or that no batch can take; found out here, not in the epoch that
                draws it.
        """
        self._audio, self._text = np.asarray(audio_tokens), np.asarray(text_tokens)
        for name, tokens in (("audio_tokens", self._audio), ("text_tokens", self._text)):
            if tokens.ndim != 2 or len(tokens) != mixture.num_rows or tokens.dtype.kind not in "iu":
                raise ValueError(f"{name} is {tokens.dtype} {list(tokens.shape)}, expected [{mixture.num_rows}, …] int")
        longest_audio, longest_text = _largest(self._audio), _largest(self._text)
        empty = np.flatnonzero(longest_audio + longest_text == 0)
        if len(empty):
            raise DataError(f"example {empty[0]} has neither audio nor text ({len(empty)} such): leave them out")
        require_budget(int((longest_audio + longest_text).max()), limits.max_batch_tokens)
        require_memory(longest_audio, longest_text, limits)
        if window_rows < 1:
            raise ValueError(f"window_rows is {window_rows}, expected at least 1")
        self.mixture, self._limits, self._seed, self._window_rows = mixture, limits, seed, window_rows
        self._turns = Turns(seed)
        self._windows: dict[tuple[int, int], _Window] = {}
        self.fingerprint = self._fingerprint(fingerprint)
        """Hex SHA-256 of all that decides the order: two orders with one fingerprint are the same."""

    def _fingerprint(self, of_data: str) -> str:
        limits, mixture = self._limits, self.mixture
        facts = [
            FORMAT_VERSION, of_data, self._seed, self._window_rows, limits.max_batch_tokens, limits.mode,
            limits.max_batch_bytes, mixture.sizes, mixture.passes, self._audio.shape, self._text.shape,
        ]  # fmt: skip
        digest = hashlib.sha256(repr(facts).encode())
        for tokens in (self._audio, self._text):
            digest.update(np.ascontiguousarray(tokens, dtype="<i4").data)
        if limits.memory is not None:  # by what it predicts at a grid of shapes
            steps = np.unique(np.geomspace(1, limits.max_batch_tokens, 16).astype(np.int64))
            grid = np.meshgrid(steps, np.append(0, steps), np.append(0, steps), indexing="ij")
            digest.update(np.asarray(limits.memory.predict(*(axis.ravel() for axis in grid)), dtype="<f8").data)
        digest.update(random_numbers(self._seed))
        return digest.hexdigest()

    def num_windows(self, epoch: int) -> int:
        """Windows in an epoch, of one size within one place."""
        return -(-self.mixture.num_places(epoch) // self._window_rows)

    def num_batches(self, epoch: int, window: int) -> int:
        """Batches in a window. Plans it."""
        return len(self._window(epoch, window).batches)

    def epochs(self, position: Position) -> float:
        """How often the data has come up to a position; in the middle of an epoch, about."""
        epoch, window, batch = position
        share = batch / self.num_batches(epoch, window) if batch else 0.0
        return epoch + (window + share) / self.num_windows(epoch)

    def batch(self, epoch: int, window: int, index: int) -> PlannedBatch:
        """One batch.

        Raises:
            IndexError: there is no such batch in the window, or no such window.
        """
        found = self._window(epoch, window)
        chosen = found.batches[index]
        items = found.items
        return PlannedBatch(items.rows[chosen], items.versions[chosen], items.prompts[chosen], items.copies[chosen])

    def _window(self, epoch: int, window: int) -> _Window:
        key = (epoch, window)
        if key not in self._windows:
            self._windows = dict(list(self._windows.items())[-1:])  # the last two are enough
            self._windows[key] = self._plan(epoch, window)
        return self._windows[key]

    def _plan(self, epoch: int, window: int) -> _Window:
        num_windows, num_places = self.num_windows(epoch), self.mixture.num_places(epoch)
        if not 0 <= window < num_windows:
            raise IndexError(f"window {window} of epoch {epoch}, which has {num_windows}")
        start, stop = (num_places * index // num_windows for index in (window, window + 1))
        draws = self.mixture.draw(epoch, start, stop)
        audio, text = self._audio[draws.rows], self._text[draws.rows]
        chosen = self._turns.choose(audio, text, draws.rows.astype(np.uint32), draws.copies)
        batches = plan(chosen.audio_tokens, chosen.text_tokens, self._limits, [self._seed, _WINDOW, epoch, window])
        return _Window(PlannedBatch(draws.rows, chosen.versions, chosen.prompts, draws.copies), batches)


class Chosen(NamedTuple):
    """A version and a prompt of each item, and their tokens; all [item]."""

    versions: np.ndarray
    prompts: np.ndarray
    audio_tokens: np.ndarray
    text_tokens: np.ndarray


class Turns:
    """Which of its versions and prompts an example comes with, each time that it comes."""

    def __init__(self, seed: int) -> None:
        self._version_key, self._prompt_key = round_keys([seed, 0x5EED], 2)

    def choose(self, audio: np.ndarray, text: np.ndarray, names: np.ndarray, copies: np.ndarray) -> Chosen:
        """Args:
        audio, text: tokens of each item's versions, [item, version], and prompts, [item, prompt]; 0 = there is none.
        names: what an example is called whenever it comes, uint32 [item].
        copies: how often it came before, [item].
        """
        num_versions, num_prompts = (np.maximum(1, np.count_nonzero(found, axis=1)) for found in (audio, text))
        turns = copies + mix(names, self._version_key)
        versions, audio_tokens = _nth_existing(audio, turns % num_versions)
        # When the two cycles have met all pairs that they can, they go on one step apart.
        turns = copies + copies // np.lcm(num_versions, num_prompts)
        turns += mix(names, self._prompt_key)
        prompts, text_tokens = _nth_existing(text, turns % num_prompts)
        return Chosen(versions, prompts, audio_tokens, text_tokens)


def random_numbers(seed: int) -> bytes:
    """For fingerprints. NumPy may change what a seed gives in a new version: then an order is another."""
    random = np.random.default_rng([seed])
    return np.concatenate([random.uniform(-1, 1, 8), random.random(8), random.permutation(8)]).tobytes()


def _largest(tokens: np.ndarray) -> np.ndarray:
    """Of each row, [row, choice] → [row]."""
    return tokens.max(axis=1, initial=0).astype(np.int64)


def _nth_existing(tokens: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The index-th choice of each row that is there, and its tokens: [row, choice], [row] → [row], [row]."""
    if tokens.shape[1] == 1:
        return np.zeros(len(tokens), dtype=np.uint8), tokens[:, 0]
    exists = tokens > 0
    reached = exists.cumsum(axis=1, dtype=np.int16) > index[:, None]  # a row without any takes its first
    choices = reached.argmax(axis=1)
    return choices, tokens[np.arange(len(tokens)), choices]


def rank_slice(step: int, num_micro_batches: int, rank: int, world_size: int) -> range:
    """Which micro-batches of the global order a rank takes in a step: every `world_size`-th one of the step's.

    Args:
        step: optimizer steps before this one.
        num_micro_batches: of one step, over all ranks.
        rank: 0 to `world_size` − 1.
        world_size: processes.

    Raises:
        ConfigError: the ranks cannot have equally many.
    """
    if num_micro_batches % world_size:
        raise ConfigError(
            f"{num_micro_batches} batches per step cannot be dealt to {world_size} processes evenly: make "
            f"accumulation_steps (over all processes) a multiple of {world_size}, or train on "
            f"{math.gcd(num_micro_batches, world_size)} processes"
        )
    return range(step * num_micro_batches + rank, (step + 1) * num_micro_batches, world_size)
