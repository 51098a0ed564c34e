"""The audit of a run on streams: each row once in an epoch of its own stream, and the shares that were asked for.

A stream has epochs of its own, which end in the middle of windows. A window is trained on as a whole before the next
one, in an order of its own. So an epoch is over where the stream's next one has begun in a window that is over.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ultravox.data.audit import MOST_EXAMPLES, Audit, AuditReport, Check, Expected, epoch_hash, order_hash
from ultravox.data.mixture import Mixture
from ultravox.data.sample_log import Records
from ultravox.errors import DataError

FEWEST_WINDOWS = 4  # that are over, for a judgement of the shares
#: Checks of `Audit` on one stream's records alone. What a step holds is seen in all records together.
OF_ONE_STREAM = (
    "known examples",
    "coverage",
    "repeats",
    "padding",
    "overlap between ranks",
    "order differs between epochs",
)


@dataclass(frozen=True, slots=True)
class ExpectedStreams:
    """What the records of a run on streams are held against."""

    uids: Mapping[str, np.ndarray]
    """Stream → names of what one epoch of it trains on, uint64 [row]."""
    shares: Mapping[str, float]
    """Stream → share that was asked for."""
    window: int
    """Clips in a window."""


def audit_streams(records: Records, expected: ExpectedStreams) -> AuditReport:
    """Hold records against one pass over each stream.

    Raises:
        DataError: there are no records, or of another order than a stream's; a stream has no row, or one twice.
    """
    found = records.without_superseded().in_order()
    if not len(found):
        raise DataError("there are no records to audit: did the run make a step?")
    if (found.window < 0).any():
        raise DataError("the log of samples has lines without a window: it is not of a run on streams")
    all_uids = np.concatenate(list(expected.uids.values()))
    mixture = Mixture({name: len(uids) for name, uids in expected.uids.items()}, seed=0)
    whole = Audit(found, Expected(all_uids, mixture))
    streams = {name: _of_stream(found, name) for name in expected.uids}
    checks = [whole.known_check()]
    for name, mine in streams.items():
        label = f"{name}: " if len(streams) > 1 else ""
        checks += [_labelled(check, label) for check in _stream_checks(mine, name, expected.uids[name], found)]
    table = _shares(found, expected)
    checks += [whole.steps_check(), _windows_check(found), _shares_check(table, found, expected)]
    epochs = whole.epochs
    return AuditReport(
        checks=checks,
        num_records=len(found),
        num_ids=len(np.unique(found.uid)),
        num_superseded=found.num_superseded,
        num_attempts=len(found.first_steps),
        num_ranks=len(np.unique(found.rank)),
        num_workers=len(np.unique(found.worker)),
        epochs=epochs,
        order_hash=order_hash(found),
        epoch_hashes={epoch: epoch_hash(found, epoch) for epoch in epochs},
        mixture=table,
    )


def _of_stream(records: Records, name: str) -> Records:
    codes = {known: code for code, known in enumerate(records.source_names)}
    return records.take(records.source == codes.get(name, -1))


def _labelled(check: Check, label: str) -> Check:
    return Check(label + check.name, check.passed, check.expected, check.found, check.examples)


def _stream_checks(mine: Records, name: str, uids: np.ndarray, everything: Records) -> list[Check]:
    """The checks of one stream's rows."""
    if not len(mine):
        return [Check("coverage", False, f"examples of {len(uids)} rows", "none at all")]
    complete = _complete_epochs(mine, everything)
    audit = Audit(mine, Expected(uids, Mixture({name: len(uids)}, seed=0), complete=complete))
    found = {check.name: check for check in audit.checks()}
    return [*(found[wanted] for wanted in OF_ONE_STREAM), _epochs_check(mine)]


def _complete_epochs(mine: Records, everything: Records) -> list[int]:
    """The epochs of a stream that are over on every rank."""
    begun = []
    for rank in np.unique(everything.rank):
        last = everything.window[everything.rank == rank].max()
        over = mine.epoch[(mine.rank == rank) & (mine.window < last)]
        begun.append(int(over.max(initial=0)))
    return list(range(min(begun)))


def _epochs_check(mine: Records) -> Check:
    """Whether a stream's epochs come in turn, from 0: what a window has of it is behind what the window before had."""
    odd: list[str] = []
    for rank in np.unique(mine.rank):
        one = mine.take(mine.rank == rank)
        windows, places = np.unique(one.window, return_inverse=True)
        first, last = np.full(len(windows), np.iinfo(np.int32).max), np.zeros(len(windows), dtype=np.int64)
        np.minimum.at(first, places, one.epoch)
        np.maximum.at(last, places, one.epoch)
        back = np.flatnonzero(first[1:] < last[:-1])
        odd += [f"window {windows[1:][i]} of rank {rank}" for i in back]
    epochs = np.unique(mine.epoch).tolist()
    missing = sorted(set(range(max(epochs))) - set(epochs))
    odd += [f"epoch {epoch} is missing" for epoch in missing]
    return Check("epochs", not odd, "in turn, from 0", f"{len(epochs)} epochs", odd[:MOST_EXAMPLES])


def _windows_check(found: Records) -> Check:
    """Whether the windows of each rank were trained on one behind the other."""
    back = []
    for rank in np.unique(found.rank):
        one = found.take(found.rank == rank)
        back += [f"step {one.step[i + 1]}" for i in np.flatnonzero(np.diff(one.window) < 0)]
    return Check("windows", not back, "one behind the other", f"{len(back)} go back", back[:MOST_EXAMPLES])


def _shares(found: Records, expected: ExpectedStreams) -> list[dict[str, Any]]:
    """Shares of the streams over the windows that are over, beside those that were asked for.

    Clips are drawn for the streams that are behind, a window at a time: at no window's end is a share off by more
    examples than a window has.
    """
    over = np.zeros(len(found), dtype=bool)
    for rank in np.unique(found.rank):
        mine = found.rank == rank
        over |= mine & (found.window < found.window[mine].max())
    ranks = len(np.unique(found.rank))
    num = int(over.sum())
    codes = {name: code for code, name in enumerate(found.source_names)}
    rows = []
    for name, requested in expected.shares.items():
        count = int((over & (found.source == codes.get(name, -1))).sum())
        limit = ranks * (expected.window + len(expected.shares))
        row = {"source": name, "requested": requested, "realised": count / num if num else 0.0, "num_examples": count}
        rows.append(row | {"ok": abs(count - requested * num) <= limit})
    return rows


def _shares_check(table: Sequence[Mapping[str, Any]], found: Records, expected: ExpectedStreams) -> Check:
    wrong = [row for row in table if not row["ok"]]
    judged = min(int(found.window[found.rank == rank].max()) for rank in np.unique(found.rank)) >= FEWEST_WINDOWS
    realised = ", ".join(f"{row['source']} {row['realised']:.2%}" for row in table[:MOST_EXAMPLES])
    return Check(
        "mixture",
        not wrong if judged else None,
        ", ".join(f"{name} {share:.2%}" for name, share in list(expected.shares.items())[:MOST_EXAMPLES]),
        realised if judged else f"{realised}, of too few windows",
        [f"{row['source']} {row['realised']:.2%}" for row in wrong[:MOST_EXAMPLES]],
    )
