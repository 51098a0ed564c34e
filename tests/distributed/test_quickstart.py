"""The quickstart's own configuration, shortened, on two gloo ranks by each engine, against one process."""

import json
from pathlib import Path

import pytest
from test_runs import losses
from two_ranks import train

from ultravox.files import ultravox_home

ROOT = Path(__file__).parent.parent.parent
HOME = ultravox_home()
"""With the models and the data; each test is given another one."""
SAME = 1e-5
"""Relative: float32, of which only the order of sums differs."""
SHORT = [
    *("--data.sources.asterisk-en.max_clips", "40", "--data.sources.asterisk-en.speeds", "[1.0]"),
    *("--data.sources.synthetic-en.max_clips", "8", "--data.sources.spoken-requests-en.max_clips", "16"),
    *("--stages.align.max_steps", "2", "--stages.align.optim.warmup_steps", "1"),
    *("--stages.tune.max_steps", "2", "--stages.tune.optim.warmup_steps", "1"),
    *(
        "--stages.align.evaluate_every",
        "0",
        "--stages.tune.evaluate_every",
        "0",
        "--evaluation.num_progress_clips",
        "1",
    ),
    *("--stages.align.log_every", "1", "--stages.tune.log_every", "1", "--logging.tensorboard", "false"),
    *("--stages.align.accumulation_steps", "2", "--stages.align.max_batch_tokens", "300"),
    *("--stages.tune.accumulation_steps", "2", "--stages.tune.max_batch_tokens", "350"),
]


def run(folder: Path, name: str, world_size: int, *more: str) -> Path:
    """The run's folder."""
    config = str(ROOT / "configs" / "quickstart.yaml")
    home = {"ULTRAVOX_HOME": str(HOME)}
    for code, output in train(config, world_size, *SHORT, "--run_dir", str(folder / name), *more, **home):
        assert code == 0, output
    return folder / name


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(tmp_path_factory.mktemp("alone"), "run", 1)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero2", "zero3"])
def test_the_quickstart_on_two_ranks(alone, tmp_path, kind):
    found = run(tmp_path, "run", 2, "--engine.kind", kind)
    expected = losses(alone)
    assert set(expected) == {(stage, step) for stage in ("align", "tune") for step in (1, 2)}
    assert losses(found) == pytest.approx(expected, rel=SAME)
    summary = json.loads((found / "train.json").read_text())
    assert summary["engine"] == {"kind": kind, "world_size": 2, "device": "cpu"}
