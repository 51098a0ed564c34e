"""Which example, at which speed, is in which batch of which epoch: the endless order of the data, without any state."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ultravox.data.plan import plan_batches, require_budget


@dataclass(frozen=True, slots=True)
class BatchItem:
    """One example at one of its versions (speeds)."""

    example: int
    version: int


class BatchOrder:
    """The batches of every epoch, as a pure function of its arguments.

    In each epoch every example comes `repeats` times, each time in the next of its versions: an example meets all its
    speeds in as few epochs as possible, and examples are out of step with one another.
    """

    def __init__(
        self,
        lengths: Sequence[Sequence[int]] | np.ndarray,
        repeats: Sequence[int],
        max_batch_tokens: int,
        seed: int,
        *,
        count_padding: bool = True,
    ) -> None:
        """Args:
        lengths: tokens of each version of each example, [example, version]; 0 = that version does not exist.
        repeats: how often each example comes in one epoch, [example].
        max_batch_tokens: budget of a batch.
        seed: of the run.
        count_padding: whether padding counts in the budget.

        Raises:
            DataError: a version is longer than the budget; found out here, not in the epoch that draws it.
        """
        self._lengths = np.asarray(lengths, dtype=np.int64).reshape(len(repeats), -1 if len(repeats) else 0)
        require_budget(int(self._lengths.max(initial=0)), max_batch_tokens)
        self._exists = [np.flatnonzero(row > 0) for row in self._lengths]
        self._examples = np.repeat(np.arange(len(repeats)), repeats)
        self._copies = np.concatenate([np.arange(count) for count in repeats]) if len(repeats) else np.zeros(0, int)
        self._repeats = np.asarray(repeats)
        self._offsets = np.random.default_rng([seed, 0x5EED]).integers(0, 1 << 30, len(repeats))
        self._budget, self._seed, self._count_padding = max_batch_tokens, seed, count_padding
        self._plans: dict[int, tuple[np.ndarray, list[np.ndarray]]] = {}

    def _plan(self, epoch: int) -> tuple[np.ndarray, list[np.ndarray]]:
        if epoch not in self._plans:
            turn = self._offsets[self._examples] + epoch * self._repeats[self._examples] + self._copies
            choices = (self._exists[example] for example in self._examples)
            versions = np.array([found[i % len(found)] for found, i in zip(choices, turn, strict=True)], dtype=np.int64)
            lengths = self._lengths[self._examples, versions]
            self._plans = {e: p for e, p in self._plans.items() if e == epoch - 1}  # the last two are enough
            batches = plan_batches(lengths, self._budget, self._seed, epoch, count_padding=self._count_padding)
            self._plans[epoch] = (versions, batches)
        return self._plans[epoch]

    def num_batches(self, epoch: int) -> int:
        """Batches in an epoch."""
        return len(self._plan(epoch)[1])

    def batch(self, epoch: int, index: int) -> list[BatchItem]:
        """The items of one batch."""
        versions, batches = self._plan(epoch)
        return [BatchItem(int(self._examples[item]), int(versions[item])) for item in batches[index]]


def fingerprint(parts: Sequence[str]) -> str:
    """Hex SHA-256 of a list of strings: two lists with one fingerprint are the same list."""
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()
