"""Whether a run trained on what it should have: every example, as often as asked, on one rank, in one global order.

It goes by the records that a run, or a dry run of its loader, leaves (see `sample_log`), and by what the mixture asks
for. Each check says what was expected, what came, and the first examples of what is wrong.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ultravox.data.mixture import Mixture
from ultravox.data.sample_log import Records
from ultravox.errors import DataError

MOST_EXAMPLES = 5
COMPARED = 4096  # examples at the beginning of epochs whose order is compared
FEWEST_COMPARED = 8
FEWEST_BATCHES = 30  # of an epoch that is not over, for a judgement of its mixture
MOST_DEVIATIONS = 4.0


@dataclass(frozen=True, slots=True)
class Expected:
    """What the records are held against."""

    uids: np.ndarray
    """Of each row of the mixture, uint64 [row]; see `parse_uids`."""
    mixture: Mixture
    num_epochs: int | None = None
    """So many epochs must be complete, and no other begun; None = all but the last of those that were begun."""
    complete: list[int] | None = None
    """Epochs that must be complete, where the records do not tell; others may be begun."""


@dataclass(frozen=True, slots=True)
class Check:
    """One question, and its answer."""

    name: str
    passed: bool | None
    """None: there is not enough to judge it by."""
    expected: str
    found: str
    examples: list[str] = field(default_factory=list)


@dataclass(slots=True)
class AuditReport:
    """All checks of one run."""

    checks: list[Check]
    num_records: int
    num_ids: int
    """Different examples among them."""
    num_superseded: int
    """Records of steps that a later attempt made again."""
    num_attempts: int
    num_ranks: int
    num_workers: int
    epochs: list[int]
    order_hash: str
    """Of the whole global order: equal for every number of ranks and workers."""
    epoch_hashes: dict[int, str]
    mixture: list[dict[str, Any]]
    """Of each epoch and source: requested and realised share."""

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return all(check.passed is not False for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}

    def __rich__(self) -> Any:
        """The checks as a table."""
        return checks_table(self.checks, f"{self.num_records} places in steps, order {self.order_hash[:16]}")

    def verdict(self, more: Sequence[Check] = ()) -> str:
        """How many checks, these and `more`, came to what, and on how much."""
        by_outcome: dict[bool | None, list[str]] = {True: [], False: [], None: []}
        for check in [*self.checks, *more]:
            by_outcome[check.passed].append(check.name)
        total = sum(map(len, by_outcome.values()))
        all_passed = len(by_outcome[True]) == total
        parts = [f"all {total} checks passed" if all_passed else f"{len(by_outcome[True])} of {total} checks passed"]
        parts += [f"failed: {', '.join(by_outcome[False])}"] * bool(by_outcome[False])
        parts += [f"too little to judge: {', '.join(by_outcome[None])}"] * bool(by_outcome[None])
        first, last = min(self.epochs), max(self.epochs)
        epochs = f"epoch {first}" if first == last else f"epochs {first} to {last}"
        return f"{'; '.join(parts)}; over {self.num_ids} ids in {epochs}, {self.num_records} places in steps"


def checks_table(checks: list[Check], title: str) -> Any:
    """A table for the terminal."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("", "check", "expected", "found", title=title)
    for check in checks:
        mark = {True: "[green]ok[/]", False: "[red]FAIL[/]", None: "[yellow]not judged[/]"}[check.passed]
        first = f" (first: {', '.join(check.examples)})" if check.examples else ""
        table.add_row(mark, check.name, escape(check.expected), escape(check.found + first))
    return table


def audit_records(records: Records, expected: Expected) -> AuditReport:
    """Hold records against what the mixture asks for.

    Raises:
        DataError: there are no records, or two rows of the mixture have one uid.
    """
    audit = Audit(records.without_superseded().in_order(), expected)
    found = audit.records
    return AuditReport(
        checks=audit.checks(),
        num_records=len(found),
        num_ids=len(np.unique(found.uid)),
        num_superseded=found.num_superseded,
        num_attempts=len(found.first_steps),
        num_ranks=len(np.unique(found.rank)),
        num_workers=len(np.unique(found.worker)),
        epochs=audit.epochs,
        order_hash=order_hash(found),
        epoch_hashes={epoch: epoch_hash(found, epoch) for epoch in audit.epochs},
        mixture=audit.mixture,
    )


def order_hash(ordered: Records) -> str:
    """Hex SHA-256 of the examples of each step and micro-batch, by records in the global order."""
    return _hash(ordered.uid, ordered.step, ordered.micro_batch)


def epoch_hash(ordered: Records, epoch: int) -> str:
    """Hex SHA-256 of the examples of one epoch, by records in the global order."""
    return _hash(ordered.uid[ordered.epoch == epoch])


def _hash(*columns: np.ndarray) -> str:
    digest = hashlib.sha256()
    for column in columns:
        digest.update(column.astype("<u8").data)
    return digest.hexdigest()


def compare_orders(reports: Mapping[str, AuditReport]) -> Check:
    """Whether runs with other numbers of ranks and workers, named by the keys, had one global order."""
    hashes = {name: report.order_hash for name, report in reports.items()}
    first = next(iter(hashes.values()))
    odd = [f"{name}: {found[:16]}" for name, found in hashes.items() if found != first]
    return Check(
        "one order for every setting",
        not odd if len(hashes) > 1 else None,
        f"{first[:16]} in all of {', '.join(hashes)}",
        "one order" if not odd else f"{len(set(hashes.values()))} orders",
        odd[:MOST_EXAMPLES],
    )


class Audit:
    """The checks, on records in the global order that no later attempt superseded."""

    def __init__(self, records: Records, expected: Expected) -> None:
        if not len(records):
            raise DataError("there are no records to audit: did the run make a step?")
        self.records, self.expected = records, expected
        self._sorting = np.argsort(expected.uids, kind="stable")
        in_order = expected.uids[self._sorting]
        if len(twice := np.flatnonzero(in_order[1:] == in_order[:-1])):
            raise DataError(f"two rows have one uid, {_name(in_order[twice[0]])}: the audit cannot tell them apart")
        by_uid = np.argsort(records.uid, kind="stable")  # a search in order is ten times faster
        places = np.empty(len(records), dtype=np.int64)
        places[by_uid] = np.searchsorted(in_order, records.uid[by_uid]).clip(max=len(in_order) - 1)
        self._known = in_order[places] == records.uid
        self._rows = np.where(self._known, self._sorting[places], -1)
        self.epochs: list[int] = np.unique(records.epoch).tolist()
        if expected.complete is not None:
            self._complete = expected.complete
        elif expected.num_epochs is None:
            self._complete = self.epochs[:-1]
        else:
            self._complete = list(range(expected.num_epochs))
        self._begins = np.flatnonzero(_changes(records.step) | _changes(records.micro_batch))
        self.mixture: list[dict[str, Any]] = []

    def checks(self) -> list[Check]:
        """All of them; fills `mixture` on the way."""
        missing: list[int] = []
        num_missing = 0
        surplus = []  # records beyond what the mixture asks for
        for epoch in sorted({*self.epochs, *self._complete}):
            wanted = self.expected.mixture.row_counts(epoch)
            mine = np.flatnonzero((self.records.epoch == epoch) & self._known)
            rows = self._rows[mine]
            counts = np.bincount(rows, minlength=len(wanted))
            if epoch in self._complete:
                lacking = np.flatnonzero(counts < wanted)
                num_missing += int((wanted - counts)[lacking].sum())
                missing += lacking[: MOST_EXAMPLES - len(missing)].tolist()
            mine = mine[(counts > wanted)[rows]]
            surplus.append(mine[_occurrence(self._rows[mine]) >= wanted[self._rows[mine]]])
            self._add_mixture(epoch, mine=(self.records.epoch == epoch))
        over = np.concatenate(surplus)
        # all records of examples that come too often in their epoch
        concerned = np.flatnonzero(np.isin(self._codes(), self._codes(over)) & self._known) if len(over) else over
        total = len(self.expected.uids)
        epochs = "the complete epoch" if len(self._complete) == 1 else f"each of {len(self._complete)} complete epochs"
        return [
            self.known_check(),
            self._epochs_check(),
            Check(
                "coverage",
                num_missing == 0 if self._complete else None,
                f"each of {total} ids as often as the mixture asks, in {epochs}",
                f"{num_missing} missing",
                [_name(self.expected.uids[row]) for row in missing],
            ),
            self._records_check("repeats", "no id more often in an epoch than the mixture asks", over),
            self._records_check(
                "padding", "no id again to fill up a batch or an epoch's last step", self._pads(over, concerned)
            ),
            self._records_check(
                "overlap between ranks",
                "each micro-batch, and each id of an epoch, on one rank",
                self._shared(over, concerned),
            ),
            self.steps_check(),
            self._mixture_check(),
            self._order_check(),
        ]

    def _records_check(self, name: str, expected: str, wrong: np.ndarray) -> Check:
        """A check that no record may fail; `wrong` are those that do."""
        examples = [f"{_name(self.records.uid[i])} in step {self.records.step[i]}" for i in wrong[:MOST_EXAMPLES]]
        found = f"{len(wrong)} exceptions" if len(wrong) else "no exception"
        return Check(name, not len(wrong), expected, found, examples)

    def known_check(self) -> Check:
        """Whether each record is of a row that there is, and of its source."""
        mixture = self.expected.mixture
        said = np.array([[name == known for name in self.records.source_names] for known in mixture.names])
        of_row = np.repeat(np.arange(len(mixture.sizes)), mixture.sizes)[self._rows]  # anything, where unknown
        right = self._known & said[of_row, self.records.source]
        expected = "each id is in the source that it is logged for"
        return self._records_check("known examples", expected, np.flatnonzero(~right))

    def _epochs_check(self) -> Check:
        """Whether the asked epochs were begun, one after the other."""
        wanted = self.expected.num_epochs
        right = self.epochs == list(range(len(self.epochs) if wanted is None else wanted))
        back = np.flatnonzero(np.diff(self.records.epoch) < 0)
        expected = f"{wanted} in turn" if wanted is not None else "in turn, from 0"
        shown = ", ".join(map(str, self.epochs[:MOST_EXAMPLES])) + (" …" if len(self.epochs) > MOST_EXAMPLES else "")
        return Check(
            "epochs", right and not len(back), expected, shown, [f"step {self.records.step[i + 1]}" for i in back[:1]]
        )

    def _pads(self, over: np.ndarray, concerned: np.ndarray) -> np.ndarray:
        """Records that fill up: surplus ones in their epoch's last step, and examples that come twice in one batch."""
        records = self.records
        last_steps = {epoch: records.step[records.epoch == epoch].max() for epoch in self.epochs}
        is_last = np.array([records.step[i] == last_steps[int(records.epoch[i])] for i in over], dtype=bool)
        batches = np.searchsorted(self._begins, concerned, side="right")
        again = concerned[_occurrence(batches * len(self.expected.uids) + self._rows[concerned]) > 0]
        return np.union1d(over[is_last], again)

    def _shared(self, over: np.ndarray, concerned: np.ndarray) -> np.ndarray:
        """Records of micro-batches that two ranks made, and surplus records of examples that two ranks had."""
        doubly = np.flatnonzero(np.repeat(_spread(self.records.rank, self._begins) > 0, self._sizes()))
        order = concerned[np.argsort(self._codes(concerned), kind="stable")]
        begins = np.flatnonzero(_changes(self._codes(order)))
        shared = np.repeat(_spread(self.records.rank[order], begins) > 0, np.diff(begins, append=len(order)))
        return np.union1d(doubly, np.intersect1d(order[shared], over))

    def _codes(self, chosen: np.ndarray | slice = slice(None)) -> np.ndarray:
        """One number for the epoch and row of each chosen record."""
        return self.records.epoch[chosen].astype(np.int64) * len(self.expected.uids) + self._rows[chosen]

    def _sizes(self) -> np.ndarray:
        return np.diff(self._begins, append=len(self.records))

    def steps_check(self) -> Check:
        """Whether each step but the last, in which a run may have ended, has all of its micro-batches, each once."""
        records = self.records
        steps, micro_batches = records.step[self._begins], records.micro_batch[self._begins]
        first, last, width = int(steps.min()), int(steps.max()), int(micro_batches.max()) + 1
        seen = np.bincount(steps - first, minlength=last - first + 1)[: last - first]
        gaps = np.flatnonzero(seen != width)
        twice = np.flatnonzero(~_changes(records.place) & ~_changes(records.step) & ~_changes(records.micro_batch))
        return Check(
            "steps",
            not len(gaps) and not len(twice),
            f"{width} micro-batch(es) in each of the steps {first} to {last}",
            f"{len(gaps)} steps with another number" + (f", {len(twice)} places twice" if len(twice) else ""),
            [f"step {first + i}: {seen[i]}" for i in gaps[:MOST_EXAMPLES]],
        )

    def _add_mixture(self, epoch: int, mine: np.ndarray) -> None:
        """Shares of the sources in one epoch, and by how many deviations they miss, micro-batches being the units."""
        records, mixture = self.records, self.expected.mixture
        num = int(np.count_nonzero(mine))
        sizes = np.add.reduceat(mine.astype(np.int64), self._begins)
        codes = {name: code for code, name in enumerate(records.source_names)}
        for name, requested in mixture.requested.items():
            is_source = mine & (records.source == codes.get(name, -1))
            counts = np.add.reduceat(is_source.astype(np.int64), self._begins)
            error = float(np.sqrt(((counts - requested * sizes)[sizes > 0] ** 2).sum()))
            off = abs(float(counts.sum()) - requested * num)
            complete = epoch in self._complete
            # An epoch's counts are whole numbers: each source's is off by up to one row, and so is their sum by each.
            limit = 2.0 + len(mixture.names) * requested + (0.0 if complete else MOST_DEVIATIONS * error)
            judged = complete or int((sizes > 0).sum()) >= FEWEST_BATCHES
            self.mixture.append(
                {
                    "epoch": epoch,
                    "source": name,
                    "requested": requested,
                    "realised": float(counts.sum()) / num if num else 0.0,
                    "num_examples": int(counts.sum()),
                    "judged": judged,
                    "ok": off <= limit,
                }
            )

    def _mixture_check(self) -> Check:
        judged = [row for row in self.mixture if row["judged"]]
        wrong = [row for row in judged if not row["ok"]]
        worst = max(judged, key=lambda row: abs(row["realised"] - row["requested"]), default=None)
        mixture = self.expected.mixture
        return Check(
            "mixture",
            not wrong if judged else None,
            ", ".join(f"{name} {share:.2%}" for name, share in list(mixture.requested.items())[:MOST_EXAMPLES]),
            "too few batches" if worst is None else f"at worst {worst['source']} {worst['realised']:.2%}",
            [f"{row['source']} {row['realised']:.2%} in epoch {row['epoch']}" for row in wrong[:MOST_EXAMPLES]],
        )

    def _order_check(self) -> Check:
        """Whether no two epochs begin with the same examples in the same order."""
        parts = {epoch: self.records.uid[self.records.epoch == epoch] for epoch in self.epochs}
        parts = {epoch: part for epoch, part in parts.items() if len(part) >= FEWEST_COMPARED}
        count = min([COMPARED, *map(len, parts.values())])
        hashes = {epoch: _hash(part[:count]) for epoch, part in parts.items()}
        seen: dict[str, int] = {}
        same = [
            f"epochs {seen[found]} and {epoch}"
            for epoch, found in hashes.items()
            if seen.setdefault(found, epoch) != epoch
        ]
        return Check(
            "order differs between epochs",
            not same if len(parts) > 1 else None,
            f"{len(parts)} different orders in {len(parts)} epochs",
            f"{len(set(hashes.values()))}, by their first {count} examples",
            same[:MOST_EXAMPLES],
        )


def _changes(values: np.ndarray) -> np.ndarray:
    """Whether each value is another than the one before it."""
    return np.concatenate([np.ones(min(1, len(values)), dtype=bool), values[1:] != values[:-1]])


def _spread(values: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """Largest less smallest value of each stretch, [stretch]."""
    if not len(begins):
        return np.zeros(0, dtype=values.dtype)
    return np.maximum.reduceat(values, begins) - np.minimum.reduceat(values, begins)


def _occurrence(codes: np.ndarray) -> np.ndarray:
    """How often each code came before it, [record]."""
    order = np.argsort(codes, kind="stable")
    begins = np.flatnonzero(_changes(codes[order]))
    found = np.empty(len(codes), dtype=np.int64)
    found[order] = np.arange(len(codes)) - np.repeat(begins, np.diff(begins, append=len(codes)))
    return found


def _name(uid: np.integer[Any]) -> str:
    return f"{int(uid):016x}"
