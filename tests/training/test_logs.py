import io
import json
import math

import pytest
from rich.console import Console

from ultravox.training.progress import TerminalProgress, bar
from ultravox.training.trackers.jsonl import JsonLinesLog, drop_rows_after
from ultravox.training.trainer import StepRecord


def record(step, **changes):
    values = {
        "stage": "tune",
        "step": step,
        "max_steps": 10,
        "loss": float(step),
        "lr": {"projector": 1e-3, "language_model": 5e-4},
        "grad_norm": 0.5,
        "audio_seconds": 20.0,
        "num_tokens": 300,
        "elapsed_seconds": 2.0 * step,
        "metrics": {"ctc": 2.0 * step},
    }
    return StepRecord(**{**values, **changes})


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_row_holds_means_and_rates_of_its_steps(tmp_path):
    log = JsonLinesLog(tmp_path / "log.jsonl", log_every=4)
    for step in range(1, 11):
        log.on_step(record(step))
    log.on_evaluation("tune", 10, {"wer": 0.25})
    log.close()
    written = rows(tmp_path / "log.jsonl")
    assert [row["step"] for row in written] == [4, 8, 10, 10]
    assert [row["loss"] for row in written[:3]] == [2.5, 6.5, 9.5]
    assert written[0]["ctc"] == 5.0
    assert written[1]["audio_seconds_per_second"] == pytest.approx(10)
    assert written[1]["tokens_per_second"] == pytest.approx(150)
    keys = {
        "version",
        "stage",
        "step",
        "loss",
        "lr",
        "lr_language_model",
        "grad_norm",
        "elapsed_seconds",
        "memory_bytes",
    }
    assert keys <= set(written[0])
    assert written[3]["wer"] == 0.25


def test_rates_after_a_resume_are_of_the_time_since(tmp_path):
    """Resumed after step 100, which a process before had taken 1000 s to get to; a step still takes 2 s."""
    steps = [record(step, max_steps=110, elapsed_seconds=1000 + 2.0 * (step - 100)) for step in range(101, 111)]
    log = JsonLinesLog(tmp_path / "log.jsonl", log_every=5, elapsed_seconds=1000.0)
    output = io.StringIO()
    console = Console(file=output, width=200)
    progress = TerminalProgress("tune", 110, 5, console, elapsed_seconds=1000.0)
    for step in steps:
        log.on_step(step)
        progress.on_step(step)
    log.close()
    progress.close()
    written = rows(tmp_path / "log.jsonl")
    assert [row["step"] for row in written] == [105, 110]
    assert [row["audio_seconds_per_second"] for row in written] == pytest.approx([10, 10])
    assert output.getvalue().count(" 10 audio-s/s  150 tokens/s") == 2


def test_a_step_left_out_is_named_and_not_averaged(tmp_path):
    log = JsonLinesLog(tmp_path / "log.jsonl", log_every=2)
    log.on_step(record(1, loss=math.nan, grad_norm=math.nan, skipped_ids=["clip-7"], metrics={}))
    log.on_step(record(2))
    log.close()
    written = rows(tmp_path / "log.jsonl")
    assert written[0] == {"version": 1, "stage": "tune", "step": 1, "skipped_ids": ["clip-7"]}
    assert written[1]["loss"] == 2.0


def test_not_a_number_is_null_in_json(tmp_path):
    log = JsonLinesLog(tmp_path / "log.jsonl", log_every=1)
    log.on_step(record(1, loss=math.nan, skipped_ids=["a"]))
    log.close()
    assert rows(tmp_path / "log.jsonl")[1]["loss"] is None


def test_resuming_forgets_what_came_later(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [("align", 5), ("align", 10), ("tune", 5), ("tune", 10)]
    path.write_text("".join(json.dumps({"stage": stage, "step": step}) + "\n" for stage, step in lines) + '{"sta')
    drop_rows_after(path, ["align", "tune"], "tune", 5)
    assert [(row["stage"], row["step"]) for row in rows(path)] == lines[:3]
    drop_rows_after(path, ["align", "tune"], "align", 5)
    assert [(row["stage"], row["step"]) for row in rows(path)] == lines[:1]
    drop_rows_after(path, ["align", "tune"])
    assert rows(path) == []
    drop_rows_after(tmp_path / "absent.jsonl", ["align"])


def test_without_a_terminal_a_line_now_and_then():
    output = io.StringIO()
    progress = TerminalProgress("tune", 10, 5, Console(file=output, width=200))
    progress.on_evaluation("tune", 0, {"wer": 0.421})
    for step in range(1, 11):
        progress.on_step(record(step))
    progress.close()
    lines = output.getvalue().splitlines()
    assert len(lines) == 3
    for part in ["tune 5/10", "loss 3.000", "WER so far 42.1%", "10 audio-s/s", "150 tokens/s", "GB", "0:10 left"]:
        assert part in lines[1]


def test_in_a_terminal_a_live_line():
    output = io.StringIO()
    progress = TerminalProgress("tune", 10, 5, Console(file=output, width=160, force_terminal=True))
    for step in range(1, 11):
        progress.on_step(record(step, skipped_ids=["clip-3"] if step == 7 else None))
    progress.close()
    assert "10/10" in output.getvalue()
    assert "clip-3" in output.getvalue()


def test_bar_without_a_terminal_says_beginning_and_end():
    output = io.StringIO()
    with bar("encoding", console=Console(file=output, width=120)) as progress:
        for done in range(1, 11):
            progress(done, 10)
    assert output.getvalue().splitlines() == ["encoding: 1 of 10 s of audio", "encoding: 10 of 10 s of audio"]


def test_tensorboard_files(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from ultravox.training.trackers.tensorboard import TensorBoardLog

    log = TensorBoardLog(tmp_path, log_every=5)
    for step in range(1, 11):
        log.on_step(record(step))
    log.on_evaluation("tune", 10, {"wer": 0.3})
    log.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("tune/loss")] == [(5, 3.0), (10, 8.0)]
    assert events.Scalars("tune/wer")[0].value == pytest.approx(0.3)


@pytest.mark.parametrize("resumed_at", [0, 5])
def test_tensorboard_forgets_what_came_after_the_step_of_a_resume(tmp_path, resumed_at):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from ultravox.training.trackers.tensorboard import TensorBoardLog

    for start, add in ((0, 0.0), (resumed_at, 100.0)):
        log = TensorBoardLog(tmp_path, log_every=1, step=start, elapsed_seconds=2.0 * start)
        for step in range(start + 1, 9 if add == 0 else 11):
            log.on_step(record(step, loss=step + add))
        log.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    expected = [(step, step + 100.0 * (step > resumed_at)) for step in range(1, 11)]
    assert [(event.step, event.value) for event in events.Scalars("tune/loss")] == expected
    assert all(event.value == pytest.approx(10) for event in events.Scalars("tune/audio_seconds_per_second"))
