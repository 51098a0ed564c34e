"""Controls: silence is silent, swapped audio is really another text's."""

import random

import numpy as np
import pytest

from ultravox.errors import DataError
from ultravox.evaluation.controls import derangement, silence_like


def test_silence_has_the_same_lengths():
    silent = silence_like([np.ones(5, np.float32), np.ones(9, np.float32)])
    assert [len(waveform) for waveform in silent] == [5, 9]
    assert not any(waveform.any() for waveform in silent)


@pytest.mark.parametrize("seed", range(20))
def test_no_clip_keeps_a_text_of_its_own(seed):
    rng = random.Random(seed)
    keys = [rng.choice("abcdefgh") for _ in range(30)]
    while 2 * max(keys.count(key) for key in keys) > len(keys):
        keys = [rng.choice("abcdefgh") for _ in range(30)]
    partner = derangement(keys, seed)
    assert sorted(partner) == list(range(30))  # each audio once
    assert all(keys[index] != keys[other] for index, other in enumerate(partner))


def test_half_of_one_text_is_the_limit():
    assert derangement(["a", "a", "b", "c"])
    with pytest.raises(DataError, match="3 of 5 clips share one text"):
        derangement(["a", "a", "a", "b", "c"])
    with pytest.raises(DataError):
        derangement(["alone"])


def test_seeded():
    keys = [str(i) for i in range(12)]
    assert derangement(keys, 1) == derangement(keys, 1)
    assert derangement(keys, 1) != derangement(keys, 2)
