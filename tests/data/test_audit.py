import json
import math
import os
import signal
import subprocess
import sys
from itertools import count

import numpy as np
import pytest
from rich.console import Console

from ultravox.data.audit import Expected, audit_records, compare_orders
from ultravox.data.fingerprint import uid
from ultravox.data.mixture import Mixture
from ultravox.data.order import DataOrder, Position, rank_slice
from ultravox.data.plan import Limits
from ultravox.data.sample_log import SampleLog, log_path, next_attempt, parse_uids, read_sample_logs
from ultravox.errors import DataError

SIZES = {"en": 60, "de": 30}
UIDS = [uid("f", str(row)) for row in range(90)]


def mixture_of(**options):
    return Mixture(SIZES, seed=1, **(options or {"repeats": {"en": 1, "de": 2}}))


class Walked(DataOrder):
    """An order with a way from one place to another."""

    def position_after(self, position, steps=1):
        for _ in range(steps):
            epoch, window, batch = position[0], position[1], position[2] + 1
            if batch == self.num_batches(epoch, window):
                window, batch = window + 1, 0
            if window == self.num_windows(epoch):
                epoch, window = epoch + 1, 0
            position = Position(epoch, window, batch)
        return position


def order_of(mixture):
    lengths = np.random.default_rng(0).integers(5, 40, (90, 1))
    return Walked(lengths, 0 * lengths, mixture, Limits(150), seed=1, window_rows=50)


def source_of(row):
    return "en" if row < 60 else "de"


class Run:
    """A run that logs what it would train on, over any number of ranks, workers and attempts."""

    def __init__(self, folder, *, world=1, workers=1, per_step=4, mixture=None, rows_of=None, dealt=rank_slice):
        self.folder, self.world, self.workers, self.per_step = folder, world, workers, per_step
        self.order = order_of(mixture or mixture_of())
        self.rows_of = rows_of or self.rows_at
        self.dealt = dealt

    def rows_at(self, position, rank):
        return self.order.batch(position.epoch, position.window, position.batch).rows.tolist()

    def steps(self, first, stop, attempt=0):
        begin = self.order.position_after(Position(), first * self.per_step)
        for rank in range(self.world):
            with SampleLog(self.folder, rank=rank, world_size=self.world, attempt=attempt, first_step=first) as log:
                position, number = begin, first * self.per_step
                for step in range(first, stop):
                    mine = self.dealt(step, self.per_step, rank, self.world)
                    for micro_batch in range(self.per_step):
                        if number in mine:
                            rows = self.rows_of(position, rank)
                            log.write(
                                step=step,
                                micro_batch=micro_batch,
                                worker=number % self.workers,
                                epoch=position.epoch,
                                uids=[UIDS[row] for row in rows],
                                sources=[source_of(row) for row in rows],
                            )
                        position, number = self.order.position_after(position), number + 1

    def audit(self, **options):
        mixture = self.order.mixture
        return audit_records(read_sample_logs(self.folder), Expected(parse_uids(UIDS), mixture, **options))


def failed(report):
    return {check.name for check in report.checks if check.passed is False}


def steps_of(run, epochs):
    """So many steps that they reach past this many epochs."""
    position, number = Position(), count()
    while position.epoch < epochs:
        position = run.order.position_after(position)
        next(number)
    return math.ceil(next(number) / run.per_step) + 1


@pytest.mark.parametrize("options", [{}, {"repeats": {"en": 0.5, "de": 1.5}}, {"weights": {"en": 1, "de": 3}}])
def test_a_right_run_passes_every_check(tmp_path, options):
    run = Run(tmp_path, world=2, workers=2, mixture=mixture_of(**options))
    run.steps(0, steps_of(run, 3))
    report = run.audit()
    assert report.ok
    assert all(check.passed for check in report.checks)
    assert report.num_ranks == report.num_workers == 2
    assert report.epochs[:4] == [0, 1, 2, 3]
    assert len(set(report.epoch_hashes.values())) == len(report.epochs)
    shares = {(row["epoch"], row["source"]): row["realised"] for row in report.mixture}
    for epoch in range(3):
        for name, share in run.order.mixture.realised(epoch).items():
            assert shares[epoch, name] == pytest.approx(share)


def test_the_order_is_one_for_every_number_of_ranks_and_workers(tmp_path):
    reports = {}
    for world in (1, 2, 4):
        for workers in (1, 2):
            run = Run(tmp_path / f"{world}-{workers}", world=world, workers=workers)
            run.steps(0, 9)
            reports[f"{world} ranks, {workers} workers"] = run.audit()
    assert compare_orders(reports).passed
    other = Run(tmp_path / "other", per_step=2)
    other.steps(0, 18)  # the same micro-batches, in other steps
    check = compare_orders(reports | {"odd": other.audit()})
    assert check.passed is False
    assert check.examples[0].startswith("odd: ")


def test_a_dataset_split_twice_is_found(tmp_path):
    """Each rank gets its half of the rows, and then a loader deals each half out over the ranks again."""

    def rows_of(position, rank):
        return [row for row in run.rows_at(position, rank) if row % 2 == rank]

    run = Run(tmp_path, world=2, rows_of=rows_of)
    run.steps(0, steps_of(run, 2))
    report = run.audit()
    assert "coverage" in failed(report)
    coverage = next(check for check in report.checks if check.name == "coverage")
    missing = int(coverage.found.split()[0])
    assert 0.3 * 240 < missing < 0.7 * 240
    assert len(coverage.examples) == 5
    assert set(coverage.examples) < set(UIDS)


def test_a_loader_that_ignores_the_epoch_is_found(tmp_path):
    def rows_of(position, rank):
        return run.rows_at(Position(0, position.window, position.batch), rank)

    plain = mixture_of(repeats={"en": 1, "de": 1})
    run = Run(tmp_path, rows_of=lambda *_: None, mixture=plain)
    whole = [(w, b) for w in range(run.order.num_windows(0)) for b in range(run.order.num_batches(0, w))]
    with SampleLog(tmp_path, rank=0, world_size=1, attempt=0, first_step=0) as log:
        for step, (epoch, window, batch) in enumerate((e, w, b) for e in range(3) for w, b in whole):
            rows = run.rows_at(Position(0, window, batch), 0)
            facts = {"uids": [UIDS[row] for row in rows], "sources": [source_of(row) for row in rows]}
            log.write(step=step, micro_batch=0, worker=0, epoch=epoch, **facts)
    report = run.audit(num_epochs=3)
    assert failed(report) == {"order differs between epochs"}
    assert report.checks[-1].examples == ["epochs 0 and 1", "epochs 0 and 2"]


def test_ranks_that_all_read_everything_are_found(tmp_path):
    run = Run(
        tmp_path, world=2, dealt=lambda step, per_step, rank, world: range(step * per_step, (step + 1) * per_step)
    )
    run.steps(0, 8)
    assert {"repeats", "overlap between ranks", "steps"} <= failed(run.audit())


def write_step(folder, rank, world, rows, micro_batch):
    """One rank's part of one step."""
    with SampleLog(folder, rank=rank, world_size=world, attempt=0, first_step=0) as log:
        facts = {"uids": [UIDS[row] for row in rows], "sources": [source_of(row) for row in rows]}
        log.write(step=0, micro_batch=micro_batch, worker=0, epoch=0, **facts)


def test_two_ranks_that_share_a_micro_batch_are_found_without_a_repeat(tmp_path):
    write_step(tmp_path, 0, 2, range(0, 6), 0)
    write_step(tmp_path, 1, 2, range(6, 9), 0)
    report = audit_records(read_sample_logs(tmp_path), Expected(parse_uids(UIDS), mixture_of()))
    assert "overlap between ranks" in failed(report)
    assert "repeats" not in failed(report)


@pytest.mark.parametrize(("second", "overlaps"), [(range(5, 9), True), ([6, 7, 7], False)])
def test_an_example_on_two_ranks_is_told_from_one_that_a_rank_repeats(tmp_path, second, overlaps):
    write_step(tmp_path, 0, 2, range(0, 6), 0)
    write_step(tmp_path, 1, 2, second, 1)
    report = audit_records(read_sample_logs(tmp_path), Expected(parse_uids(UIDS), mixture_of()))
    assert "repeats" in failed(report)
    assert ("overlap between ranks" in failed(report)) == overlaps


def rewrite(folder, change):
    """Change the lines of micro-batches of a log, as objects."""
    path = log_path(folder, 0)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines[1:])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines if line))


def repeat_at_the_end_of_the_epoch(lines):
    last = max(i for i, line in enumerate(lines) if line["epoch"] == 0)
    lines[last]["uids"].append(lines[0]["uids"][0])
    lines[last]["sources"].append(lines[0]["sources"][0])


def fill_a_batch(lines):
    lines[3]["uids"].append(lines[3]["uids"][0])
    lines[3]["sources"].append(lines[3]["sources"][0])


def repeat_in_the_middle(lines):
    lines[3]["uids"].append(lines[0]["uids"][0])
    lines[3]["sources"].append(lines[0]["sources"][0])


def forget_a_batch(lines):
    lines[2].clear()


def another_source(lines):
    lines[2]["sources"][0] = "en" if lines[2]["sources"][0] == "de" else "de"


def a_stranger(lines):
    lines[2]["uids"][0] = "0" * 16


def jump_back(lines):
    lines[-1]["epoch"] = 0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (repeat_at_the_end_of_the_epoch, {"repeats", "padding"}),
        (fill_a_batch, {"repeats", "padding"}),
        (repeat_in_the_middle, {"repeats"}),
        (forget_a_batch, {"steps", "coverage"}),
        (another_source, {"known examples"}),
        (a_stranger, {"known examples", "coverage"}),
        (jump_back, {"epochs", "repeats", "padding"}),
    ],
)
def test_each_fault_is_found_by_its_check(tmp_path, change, expected):
    run = Run(tmp_path)
    run.steps(0, steps_of(run, 2))
    assert run.audit().ok
    rewrite(tmp_path, change)
    report = run.audit()
    assert expected <= failed(report) <= expected | {"mixture"}
    assert all(check.examples for check in report.checks if check.name in expected)


@pytest.mark.parametrize("num_epochs", [None, 1])
def test_a_mixture_that_is_not_as_asked_is_found(tmp_path, num_epochs):
    run = Run(tmp_path, mixture=mixture_of(weights={"en": 1, "de": 3}))
    run.steps(0, steps_of(run, 1) if num_epochs else 8)
    asked = Mixture(SIZES, weights={"en": 3, "de": 1}, seed=1)
    report = audit_records(read_sample_logs(tmp_path), Expected(parse_uids(UIDS), asked, num_epochs=num_epochs))
    assert "mixture" in failed(report)


def test_what_cannot_be_judged_is_not_said_to_be_right(tmp_path):
    run = Run(tmp_path)
    run.steps(0, 1)
    report = run.audit()
    undecided = {check.name for check in report.checks if check.passed is None}
    assert undecided == {"coverage", "mixture", "order differs between epochs"}
    assert run.audit(num_epochs=1).ok is False


# Restarts


@pytest.mark.parametrize("world", [1, 2])
def test_steps_that_a_resumed_run_repeats_count_once(tmp_path, world):
    run = Run(tmp_path / "restarted", world=world)
    stop = steps_of(run, 3)
    for attempt, (first, end) in enumerate([(0, 7), (5, 11), (5, 6), (5, stop)]):
        assert next_attempt(run.folder) == attempt
        run.steps(first, end, attempt)
    report = run.audit()
    assert report.ok
    assert report.num_attempts == 4
    assert report.num_superseded > 0
    through = Run(tmp_path / "through", world=1)
    through.steps(0, stop)
    assert report.order_hash == through.audit().order_hash


def test_a_resume_that_skips_or_repeats_steps_is_found(tmp_path):
    run = Run(tmp_path / "skips")
    run.steps(0, 4, 0)
    run.steps(5, 9, 1)
    assert "steps" in failed(run.audit())
    again = Run(tmp_path / "repeats")
    again.steps(0, 4, 0)
    again.order.position_after = lambda position, n=1, real=again.order.position_after: real(position, min(n, 12))
    again.steps(4, 9, 1)  # goes on at batch 12, which step 3 had
    assert "repeats" in failed(again.audit())


def test_a_killed_writer_leaves_whole_lines_only(tmp_path):
    code = (
        "import sys; from pathlib import Path; from ultravox.data.sample_log import SampleLog\n"
        "log = SampleLog(Path(sys.argv[1]), rank=0, world_size=1, attempt=0, first_step=0)\n"
        "print('go', flush=True)\n"
        "for step in range(10**9):\n"
        "    log.write(step=step, micro_batch=0, worker=0, epoch=0, uids=['0' * 16] * 50, sources=['a'] * 50)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "go\n"
    while len(log_path(tmp_path, 0).read_bytes()) < 100_000:
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    whole = len(read_sample_logs(tmp_path))
    assert whole % 50 == 0
    os.truncate(log_path(tmp_path, 0), os.path.getsize(log_path(tmp_path, 0)) - 7)  # as a machine that lost power
    assert len(read_sample_logs(tmp_path)) == whole - 50
    with SampleLog(tmp_path, rank=0, world_size=1, attempt=1, first_step=10**6) as log:
        log.write(step=10**6, micro_batch=0, worker=0, epoch=0, uids=["f" * 16], sources=["b"])
    records = read_sample_logs(tmp_path)
    assert len(records) == whole - 49
    assert records.uid[-1] == 2**64 - 1
    assert records.first_steps == {0: 0, 1: 10**6}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "begins with format None, expected 1"),
        ('{"format": 2, "attempt": 0}\n', "begins with format 2, expected 1"),
        ('{"format": 1, "attempt": 0, "first_step": 0}\nnot json\n', "is damaged"),
        ('{"format": 1, "attempt": 0, "first_step": 0}\n{"surprise": 1}\n', "is damaged"),
        ('{"format": 1, "attempt": 0, "first_step": 0}\n{"attempt": 0, "uids": [], "sources": []}\n', "has no step"),
        ('{"format": 1, "attempt": 0, "first_step": 0}\nLINE0\n', "16 hex digits"),
        ('{"format": 1, "attempt": 0, "first_step": 0}\nLINE1\n', "16 hex digits"),
        ('{"format": 1, "attempt": 0, "first_step": 0}\nLINE2\n', "not as many sources"),
        ('{"format": 1, "attempt": 0, "first_step": 0}\nLINE3\n', "attempt 4 has no first line"),
    ],
)
def test_damaged_logs_are_refused_by_name(tmp_path, text, message):
    line = {"attempt": 0, "step": 0, "micro_batch": 0, "worker": 0, "epoch": 0, "sources": ["a"], "uids": ["0" * 16]}
    spoilt = [{"uids": ["0" * 15]}, {"uids": ["x" * 16]}, {"sources": []}, {"attempt": 4}]
    for index, change in enumerate(spoilt):
        text = text.replace(f"LINE{index}", json.dumps(line | change))
    log_path(tmp_path, 0).write_text(text)
    with pytest.raises(DataError, match=message):
        read_sample_logs(tmp_path)


def test_no_log_and_ambiguous_names_are_errors(tmp_path):
    with pytest.raises(DataError, match=r"holds no samples-rank<r>\.jsonl"):
        read_sample_logs(tmp_path)
    run = Run(tmp_path)
    run.steps(0, 2)
    with pytest.raises(DataError, match="two rows have one uid"):
        audit_records(read_sample_logs(tmp_path), Expected(parse_uids(UIDS[:-1] + UIDS[:1]), mixture_of()))


def test_the_report_is_shown_and_kept(tmp_path):
    run = Run(tmp_path)
    run.steps(0, steps_of(run, 2))
    rewrite(tmp_path, forget_a_batch)
    report = run.audit()
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(report)
    shown = console.export_text()
    assert "FAIL" in shown
    assert "coverage" in shown
    kept = json.loads(json.dumps(report.to_json()))
    assert kept["ok"] is False
    assert {check["name"] for check in kept["checks"]} == {check.name for check in report.checks}
