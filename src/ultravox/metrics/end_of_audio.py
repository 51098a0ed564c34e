"""How well it is told that a speaker has finished, and how soon; beside a baseline that knows the length alone."""

from collections.abc import Sequence

import numpy as np

#: Shares of the clips in which the speaker may be interrupted, for the latency.
FALSE_CUT_OFF_RATES = (0.01, 0.05, 0.10)


def decision_metrics(scores: np.ndarray, whole: np.ndarray) -> dict[str, float]:
    """Of decisions at the end of each clip.

    Args:
        scores: probability that the speaker has finished, [clip].
        whole: whether the speaker has, bool [clip].

    Returns:
        `accuracy` at 0.5, and `false_cut_offs` = share of the cut clips that are taken for whole ones.
    """
    said = scores > 0.5
    cut = ~whole
    found = {"accuracy": float((said == whole).mean())}
    return found | ({"false_cut_offs": float(said[cut].mean())} if cut.any() else {})


def length_only_accuracy(seconds: np.ndarray, whole: np.ndarray) -> float:
    """The best that "longer than so many seconds is whole" can do on these very clips, each threshold tried, or none.

    It is chosen on the clips that it is judged on, so that it is flattered: what does not beat it has learnt nothing
    but lengths.
    """
    order = np.argsort(seconds, kind="stable")
    ordered = whole[order]
    right = np.concatenate([[0], np.cumsum(~ordered)]) + (ordered.sum() - np.concatenate([[0], np.cumsum(ordered)]))
    sorted_seconds = seconds[order]
    allowed = np.ones(len(right), dtype=bool)
    allowed[1:-1] = np.diff(sorted_seconds) > 0  # equal lengths are on one side
    return float(right[allowed].max() / len(whole))


def latency_metrics(
    scores: Sequence[np.ndarray],
    speech_seconds: Sequence[float | None],
    seconds_per_position: float,
    rates: Sequence[float] = FALSE_CUT_OFF_RATES,
) -> dict[str, float]:
    """How long after the end of speech it is noticed, with a threshold that interrupts in no more than a given share.

    A clip is interrupted when some position passes the threshold before its speech ends; one that was cut never ends.

    Args:
        scores: of each clip's positions, each [position].
        speech_seconds: where each clip's speech ends; None = it was cut.
        seconds_per_position: of audio.
        rates: largest shares of interrupted clips.

    Returns:
        for each rate (1 = 1%): `latency_at_<percent>`, the median in seconds over the whole clips that are noticed (not
        there when none is), and `missed_at_<percent>`, the share of the whole clips that never are.
    """
    early, late = [], []
    for values, end in zip(scores, speech_seconds, strict=True):
        ends = (np.arange(len(values)) + 1) * seconds_per_position
        before = ends <= (np.inf if end is None else end - 1e-9)
        early.append(values[before].max(initial=-np.inf))
        if end is not None:
            late.append((values[~before], ends[~before] - end))
    ranked = np.sort(np.array(early))[::-1]
    found: dict[str, float] = {}
    for rate in rates:
        allowed = int(rate * len(ranked) + 1e-9)
        threshold = ranked[allowed] if allowed < len(ranked) else -np.inf
        delays = [delay[values > threshold][0] for values, delay in late if (values > threshold).any()]
        name = f"{100 * rate:g}"
        if delays:
            found[f"latency_at_{name}"] = float(np.median(delays))
        if late:
            found[f"missed_at_{name}"] = 1 - len(delays) / len(late)
    return found
