"""How many steps a function that nobody here wrote makes of so many samples: found by trying, and checked."""

from collections.abc import Callable, Sequence

from ultravox.audio.lengths import SAMPLE_RATE, chain_length
from ultravox.errors import ModelError


def fit_steps(count: Callable[[int], int], sizes: Sequence[int], what: str) -> tuple[int, int]:
    """The (offset, divisor) with count(n) = (n + offset) // divisor at all of these sizes.

    Args:
        count: from a size to a number of steps, never falling.
        sizes: at least two, from the least to the greatest. Two steps are looked for between the first and the last;
            all are tried then.
        what: it is called so in an error.

    Raises:
        ModelError: there is none, such as where all sizes are padded to one.
    """
    least, most = sizes[0], sizes[-1]
    base = count(least)
    if count(most) < base + 2:
        raise ModelError(f"{what} makes {base} steps of {least} and {count(most)} of {most}: it does not follow length")
    first, second = (_least_size(count, base + more, least, most) for more in (1, 2))
    divisor = second - first
    steps = (base + 1) * divisor - first, divisor
    for size in sizes:
        if count(size) != chain_length(size, [steps]):
            raise ModelError(
                f"{what} makes {count(size)} steps of {size}, where a step every {divisor} would give "
                f"{chain_length(size, [steps])}: the frames of such an encoder cannot be counted beforehand"
            )
    return steps


def _least_size(count: Callable[[int], int], wanted: int, low: int, high: int) -> int:
    """The least size in (low, high] with so many steps."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if count(middle) >= wanted else (middle, high)
    return high


#: Samples at which a feature extractor is tried: 0.2 to 31 s, and odd ones between.
SAMPLE_SIZES = (3200, 3201, 5000, 8000, 12_345, SAMPLE_RATE, 40_001, 31 * SAMPLE_RATE)
