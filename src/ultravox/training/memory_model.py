"""How much memory a batch will take, before it is made: a few batches are measured, and a sum is fitted to them.

Memory grows with a batch's positions, with the squares of its rows' lengths and so on, by factors that depend on the
model, on what trains and on the kernels in use. Instead of deriving the factors, `calibrate` measures a handful of
batches of different shapes and fits the factors by non-negative least squares. What a batch takes is counted beside
what the process holds before it: weights, moments of the optimizer and the libraries themselves are not in it.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ultravox.errors import DataError
from ultravox.model.fast_attention import MAX_KEPT_TOKENS
from ultravox.model.kernels import ROWS_MULTIPLE
from ultravox.training.splitting import is_out_of_memory

FORMAT_VERSION = 1
Shape = tuple[int, int, int]
"""Rows, audio tokens of all of them, text tokens of all of them."""
Measure = Callable[[int, int, int], int]
"""The peak of a batch of such a shape, in bytes beside what is held before it; its rows are those of `spread_rows`."""

#: By so much the rows of a measured batch differ: those of a real one are of like length, but not the same.
SPREAD = 0.1

#: What is added to the largest residual: the same batch takes so much more another time.
REPEAT_MARGIN = 0.04
#: Text tokens that a row has at least, where it has any.
LEAST_TEXT = 4
#: Least number of probes: with fewer, the residuals say nothing.
MIN_PROBES = 6
#: Under a limit, a batch is only measured where those before it let expect at most the limit / this: batches of as many
#: tokens differ by about as much, if those that were measured did not differ by more.
CAREFULNESS = 1.15
#: Larger batches are sought as long as so many times more tokens are expected to fit.
LEAST_GROWTH = 1.2


@dataclass(frozen=True)
class MemoryModel:
    """Predicts what a batch takes. Coefficients are bytes per unit of each of `TERMS`, none of them negative."""

    coefficients: Mapping[str, float]
    margin: float
    """Share that predictions stand above the fit."""
    probes: Sequence[tuple[int, int, int, int]] = field(default=())
    """What it was fitted to: rows, audio tokens, text tokens, bytes."""

    def predict(
        self, num_rows: Any, audio_tokens: Any, text_tokens: Any, longest: Any = None, *, bound: bool = False
    ) -> np.ndarray:
        """Peak memory of batches, in bytes beside what the process holds before: int64, of the arguments' shape.

        Args:
            num_rows: rows of each batch; a number or an array, as the others are.
            audio_tokens, text_tokens: positions of all rows of each batch. Where rows are padded, with the padding.
            longest: positions of the longest row, audio and text; None = all rows are alike.
            bound: predict the most that batches of so many rows take, none of which is longer than these.
        """
        columns = _terms(num_rows, audio_tokens, text_tokens, longest, bound=bound)
        total = sum(columns[name] * value for name, value in self.coefficients.items())
        return np.ceil(np.asarray(total) * (1 + self.margin)).astype(np.int64)

    def to_json(self) -> dict[str, Any]:
        """As `from_json` reads it."""
        return {
            "version": FORMAT_VERSION,
            "coefficients": dict(self.coefficients),
            "margin": self.margin,
            "probes": [list(probe) for probe in self.probes],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "MemoryModel":
        """Undo `to_json`. DataError when it is of another version or does not hold what it should."""
        if content.get("version") != FORMAT_VERSION:
            raise DataError(f"a memory model of version {content.get('version')} cannot be read, only {FORMAT_VERSION}")
        coefficients = {str(name): float(value) for name, value in content["coefficients"].items()}
        if unknown := sorted(set(coefficients) - set(TERMS)):
            raise DataError(f"the memory model has a term {unknown[0]!r} that is not known: calibrate it again")
        if min([*coefficients.values(), float(content["margin"])]) < 0:
            raise DataError("the memory model has a negative coefficient: calibrate it again")
        probes = tuple((int(r), int(a), int(t), int(b)) for r, a, t, b in content["probes"])
        return cls(coefficients, float(content["margin"]), probes)

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of what decides the predictions, and with them the batches."""
        decisive = [FORMAT_VERSION, sorted(self.coefficients.items()), self.margin]
        return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class OfLongest:
    """The same, asked as a plan asks, which knows a batch's longest row alone. It does not fall when a number grows."""

    model: MemoryModel

    def predict(self, num_rows: np.ndarray, audio_tokens: np.ndarray, text_tokens: np.ndarray) -> np.ndarray:
        """Bytes of batches, of the rows' number and the tokens of the longest row, each [batch]."""
        return self.model.predict(num_rows, num_rows * audio_tokens, num_rows * text_tokens, bound=True)


def spread_rows(num_rows: int, audio_tokens: int, text_tokens: int) -> list[tuple[int, int]]:
    """Audio and text tokens of each row of a measured batch; they sum up to those of the shape.

    No row is without audio where there is enough for all: it would have no window, as no real row of that kind has.
    """
    share = np.linspace(1 - SPREAD, 1 + SPREAD, num_rows) / num_rows if num_rows > 1 else np.ones(1)
    each = min(1, audio_tokens // num_rows)
    parts = [[audio_tokens - each * num_rows], [text_tokens]]
    ends = np.round(np.cumsum([share, np.full(num_rows, 1 / num_rows)], axis=1) * parts)
    audio, text = np.diff(ends.astype(int), axis=1, prepend=0)
    return list(zip((audio + each).tolist(), text.tolist(), strict=True))


def _terms(
    num_rows: Any, audio_tokens: Any, text_tokens: Any, longest: Any = None, *, bound: bool = False
) -> dict[str, np.ndarray]:
    """What memory may grow with, each of the arguments' shape."""
    rows, audio, text = (np.asarray(value, dtype=np.float64) for value in (num_rows, audio_tokens, text_tokens))
    total = audio + text
    length = total / rows if longest is None else np.asarray(longest, dtype=np.float64)
    squares = rows * length**2
    kept = rows * MAX_KEPT_TOKENS**2 if bound else 0.0
    filled = np.ceil(total / ROWS_MULTIPLE) * ROWS_MULTIPLE  # as packed rows are
    return {
        "constant": np.ones_like(total),
        "rows": rows,
        "tokens": filled,
        # where padded rows are longer than packed ones, they do not fit into the holes that those leave
        "padded_tokens": np.where((rows * length > filled) | (bound & (rows > 1)), filled, 0.0),
        "audio_tokens": audio,
        "text_tokens": text,
        # attention keeps its weights for each layer up to a length, and for one layer alone beyond it
        "squares_kept": np.where(length <= MAX_KEPT_TOKENS, squares, kept),
        "squares": np.where(length <= MAX_KEPT_TOKENS, 0.0, squares),
        "audio_squares": audio**2 / rows,
    }


TERMS = tuple(_terms(1, 1, 1))


def calibrate(
    measure: Measure,
    *,
    max_batch_tokens: int,
    max_audio_tokens: int,
    max_text_tokens: int,
    max_bytes: int | None = None,
    on_probe: Callable[[int, int], None] = lambda done, total: None,
) -> MemoryModel:
    """Measure batches of different shapes, small and large, and fit a model to them.

    Args:
        measure: runs a batch forwards and backwards and says what it took. A batch that does not fit into memory is
            left out, and so are all that are larger.
        max_batch_tokens: of the largest batch.
        max_audio_tokens, max_text_tokens: of the longest row.
        max_bytes: measure no batch that is expected to take more. The very smallest ones are measured all the same:
            where they take more, nothing fits.
        on_probe: is told how many batches are measured, and of how many.

    Raises:
        DataError: too few batches fit into memory.
    """
    probes = _Probes(measure, max_bytes)
    limits = _within(probes, (max_batch_tokens, max_audio_tokens, max_text_tokens))
    shapes = probe_shapes(*limits)
    small = [shape for shape in shapes if _tokens(shape) <= limits[0] / 2]
    order = [*shapes, *small]
    on_probe(0, len(order))
    for index, shape in enumerate(order):
        # Small ones are measured again after large ones: among what those have left, they take more. But the very
        # first one also pays for what is only made once, such as compiled kernels.
        if index >= len(shapes) or probes.allows(shape):
            probes.measure(shape, keep_largest=index > len(shapes))
        on_probe(index + 1, len(order))
    if len(probes.found) < MIN_PROBES:
        rows, audio, text = next(shape for shape in shapes if shape not in probes.found)
        raise DataError(
            f"a batch of {rows} rows with {audio + text} tokens does not fit into memory: lower max_batch_tokens "
            f"(now {max_batch_tokens}) or data.max_audio_seconds"
        )
    return fit([(*shape, taken) for shape, taken in probes.found.items()])


def _tokens(shape: Shape) -> int:
    return shape[1] + shape[2]


class _Probes:
    """What measured batches took, and which others may be tried after them."""

    def __init__(self, measure: Measure, max_bytes: int | None) -> None:
        self._measure, self.max_bytes = measure, max_bytes
        self.found: dict[Shape, int] = {}
        self.always = 0
        """Batches of up to so many tokens may take more than `max_bytes`."""
        self._too_many = math.inf

    def measure(self, shape: Shape, *, keep_largest: bool = False) -> None:
        """Note what a batch takes, or that batches of so many tokens do not fit into memory."""
        if _tokens(shape) >= self._too_many:
            return
        before = self.found.get(shape, 0) if keep_largest else 0
        try:
            self.found[shape] = max(before, self._measure(*shape))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._too_many = _tokens(shape)

    def most_tokens(self) -> float:
        """Of a batch that is expected to take no more than `max_bytes`, in proportion to the largest measured ones.

        Part of what they take is the same for all, so that larger batches take less than in proportion.
        """
        if self.max_bytes is None or not self.found:
            return self._too_many
        rates = [(_tokens(shape), size / _tokens(shape)) for shape, size in self.found.items()]
        alike = {most: [rate for tokens, rate in rates if 0.8 * most <= tokens <= most] for most, _ in rates}
        difference = max(max(group) / max(1.0, min(group)) for group in alike.values())
        expected = max(alike[max(alike)]) * max(CAREFULNESS, difference)
        return min(self._too_many, self.max_bytes / max(1.0, expected))

    def allows(self, shape: Shape) -> bool:
        """Whether a batch may be measured, as far as those before it say."""
        return _tokens(shape) <= max(self.always, self.most_tokens())


def _within(probes: _Probes, limits: Shape) -> Shape:
    """`limits`, the arguments of `probe_shapes`, or smaller ones where `max_bytes` wants that.

    Batches are measured on the way: each is as large as the one before it lets expect to fit.
    """
    if probes.max_bytes is None:
        return limits
    least = _tokens(first := probe_shapes(*limits)[0])
    while least < limits[0] and len(probe_shapes(*_scaled(limits, least))) < MIN_PROBES:
        least = min(2 * least, limits[0])
    probes.always = least
    for _ in range(2):  # the first time it also pays for what is only made once
        probes.measure(first)
    most = least
    while most < limits[0] and (larger := int(min(probes.most_tokens(), limits[0]))) >= LEAST_GROWTH * most:
        most = larger
        probes.measure(probe_shapes(*_scaled(limits, most))[-1])
    return _scaled(limits, max(least, int(min(probes.most_tokens(), limits[0]))))


def _scaled(limits: Shape, max_batch_tokens: int) -> Shape:
    """The same for smaller batches; where a longest row would not fit into one, it is shorter in proportion."""
    _, audio, text = limits
    share = min(1.0, max_batch_tokens / (audio + text))
    return max_batch_tokens, max(1, int(audio * share)), max(min(1, text), int(text * share))


def probe_shapes(max_batch_tokens: int, max_audio_tokens: int, max_text_tokens: int) -> list[Shape]:
    """The batches that `calibrate` measures, the smallest first: rows long and short, of much audio and of little.

    None has text where no row has any.
    """
    least_text = min(LEAST_TEXT, max_text_tokens)
    few_audio, few_text = max(1, max_audio_tokens // 8), max(least_text, max_text_tokens // 8)
    share = max_audio_tokens / (max_audio_tokens + max_text_tokens)
    pairs = [
        (max_audio_tokens, max_text_tokens),
        (max_audio_tokens, few_text),
        (few_audio, max_text_tokens),
        (few_audio, few_text),
        ((max_audio_tokens + 1) // 2, (max_text_tokens + 1) // 2),
    ]
    if max_audio_tokens + max_text_tokens > MAX_KEPT_TOKENS:  # the longest rows of which attention keeps its weights
        kept = int(MAX_KEPT_TOKENS / (1 + SPREAD))
        audio = round(kept * share)
        pairs += [(max(1, audio), max(least_text, kept - audio))]
        pairs += [(max(1, audio // 2), max(least_text, (kept - audio) // 2))]
    shapes = {(1, few_audio, few_text)}
    for parts in (1, 4, 2, 8, 16):
        if parts in (1, 4) or len(shapes) < MIN_PROBES:
            for audio, text in pairs:
                rows = max(1, int(max_batch_tokens / parts / (audio + text)))
                shapes.add((rows, rows * audio, rows * text))
    return sorted(shapes, key=lambda shape: (shape[1] + shape[2], shape))


def fit(probes: Sequence[tuple[int, int, int, int]]) -> MemoryModel:
    """The best non-negative sum of `TERMS` for measured batches (rows, audio tokens, text tokens, bytes).

    The error that counts is relative. Each choice of terms is tried: the one is taken that predicts each batch best
    from all the others. The largest of these errors, where the batch took more than was predicted, is the margin.
    """
    table = np.array(probes, dtype=np.float64)
    longest = [max(map(sum, spread_rows(*probe[:3]))) for probe in probes]
    columns = _terms(table[:, 0], table[:, 1], table[:, 2], longest)
    measured = np.maximum(table[:, 3], 1.0)
    relative = {name: columns[name] / measured for name in TERMS}
    others = [name for name in TERMS if name != "constant"]
    best: tuple[float, tuple[str, ...], np.ndarray, float] | None = None
    for size in range(min(len(others), len(probes) - 3) + 1):
        for chosen in itertools.combinations(others, size):
            names = ("constant", *chosen)
            found = _least_squares(np.stack([relative[name] for name in names], axis=1))
            if found is not None and (best is None or found[0] < best[0]):
                best = (found[0], names, found[1], found[2])
    assert best is not None, "a constant alone is always possible"
    _, names, coefficients, margin = best
    return MemoryModel(dict(zip(names, coefficients.tolist(), strict=True)), margin + REPEAT_MARGIN, tuple(probes))


def _least_squares(matrix: np.ndarray) -> tuple[float, np.ndarray, float] | None:
    """Coefficients with which the rows of `matrix` [probe, term] sum to 1 as nearly as possible.

    Returns: the root mean square of the errors when each probe is predicted from the others, the coefficients, and the
        largest share by which a probe exceeded such a prediction. None where a coefficient would be negative, or the
        terms cannot be told apart.
    """
    scale = np.abs(matrix).max(axis=0)
    if not scale.all():
        return None
    q, r = np.linalg.qr(matrix / scale)
    if np.abs(np.diag(r)).min() < 1e-6:
        return None
    coefficients = np.linalg.solve(r, q.sum(axis=0))
    if (coefficients < 0).any():
        return None
    leverage = np.square(q).sum(axis=1)
    if leverage.max() > 1 - 1e-9:  # one probe alone decides a term: nothing says how good it is
        return None
    errors = (1 - matrix / scale @ coefficients) / (1 - leverage)
    if errors.max() >= 1:
        return None
    return float(np.sqrt(np.square(errors).mean())), coefficients / scale, float(max(0.0, (1 / (1 - errors)).max() - 1))
