"""Controls: what the model scores without the right audio. A model that scores as well then does not listen.

Audio language models keep 60-72% of some benchmark scores with no audio at all (arXiv 2604.24401), so both controls run
in every evaluation: silence of the same length, and the audio of another clip with another text.
"""

from collections.abc import Sequence

import numpy as np

from ultravox.errors import DataError


def silence_like(waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Digital silence, as long as each waveform [sample]."""
    return [np.zeros_like(waveform) for waveform in waveforms]


def derangement(keys: Sequence[str], seed: int = 0) -> list[int]:
    """A permutation in which no clip gets the audio of a clip with the same key (its normalised text).

    Clips of one key lie next to each other in a shuffled order, and everything moves on by the size of the largest such
    group: nothing can then land in its own group. Each clip's audio is used exactly once.

    Returns:
        for each clip, the index of the clip whose audio it gets.

    Raises:
        DataError: more than half of the clips share one text, so that no such permutation exists.
    """
    members: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        members.setdefault(key, []).append(index)
    largest = max((len(group) for group in members.values()), default=0)
    if not keys or 2 * largest > len(keys):
        raise DataError(
            f"cannot swap audio between clips with different texts: {largest} of {len(keys)} clips share one text; "
            "evaluate on more clips"
        )
    rng = np.random.default_rng(seed)
    groups = [rng.permutation(group).tolist() for group in members.values()]
    order = [index for group in rng.permutation(len(groups)) for index in groups[group]]
    partner = [0] * len(keys)
    for position, index in enumerate(order):
        partner[index] = order[(position + largest) % len(order)]
    return partner
