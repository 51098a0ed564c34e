"""What counts as a transcript that has run away."""

import pytest

from ultravox.inference.repetition import repeated_tail


@pytest.mark.parametrize(
    ("tokens", "repeated"),
    [
        ([], 0),
        ([1, 2, 3, 4, 5, 6] * 2, 6),  # six tokens said twice
        ([9, 8, 1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6], 6),
        ([1, 2, 3, 4, 5] * 2, 0),  # a short phrase said twice: people do
        ([1, 2, 3, 4, 5] * 3, 10),
        ([7] * 11, 0),  # a number that is spelt
        ([7] * 12, 11),
        ([1, 2] * 6, 10),
        ([1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6, 7], 0),  # it went on with something else
        (list(range(40)), 0),
    ],
)
def test_repeated_tail(tokens: list[int], repeated: int) -> None:
    assert repeated_tail(tokens) == repeated
