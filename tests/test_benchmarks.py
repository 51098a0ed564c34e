"""The programs in benchmarks/ are runs of what ships: their settings load, and they measure what they say."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from ultravox.config.load import load_config

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def defaults():
    spec = importlib.util.spec_from_file_location("benchmark_defaults", ROOT / "benchmarks" / "defaults.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_each_sweep_has_its_points_and_its_used_one_is_the_file_itself(defaults):
    for name, sweep in defaults.SWEEPS.items():
        file = ROOT / "configs" / f"benchmark-{sweep.stage}.yaml"
        configs = {point: load_config(file, overrides) for point, overrides in sweep.points.items()}
        assert len(configs) >= 3, name
        assert [point for point, config in configs.items() if config == load_config(file)] == [sweep.used], name


def test_one_run_serves_every_sweep_of_its_stage(defaults):
    run = {"wer": 0.3, "core_seconds": 40.0, "trained": 1}
    results = {"encoder": {"frozen": {"0": run}}}
    assert defaults.already_run(results, "stack_factor", "5", 0) == run
    assert defaults.already_run(results, "stack_factor", "5", 1) is None
    assert defaults.already_run(results, "stack_factor", "10", 0) is None
    assert defaults.already_run(results, "lora_rank", "16", 0) is None
    todo = defaults.missing(results, list(defaults.SWEEPS), 2)
    assert len(todo) == len(set(todo)) == 17 + 16 - 1
    assert ("encoder", "full, rate 2e-5", 0) in todo
    assert [name for name, point, seed in todo if point == defaults.SWEEPS[name].used and seed == 1] == [
        "align_lr",
        "lora_rank",
    ]


def test_the_page_shows_mean_and_interval(defaults):
    runs = {str(seed): {"wer": wer, "core_seconds": 40, "trained": 2e6} for seed, wer in enumerate((0.30, 0.32, 0.34))}
    page = defaults.page({"stack_factor": {"5": runs}})
    assert "| 5 (used) | 32.0% ± 5.0 | 3 | 40 | 2.0 M |" in page  # 4.30 · 2.0 / √3


def test_the_page_is_that_of_the_kept_results(defaults):
    assert defaults.PAGE.read_text() == defaults.page(json.loads(defaults.RESULTS.read_text()))


@pytest.mark.network
def test_tuning_is_measured_with_each_kernel(not_fetched):
    from ultravox.errors import NetworkError
    from ultravox.model.pretrained import fetch_model

    try:
        fetch_model("smollm2-135m-instruct")
    except NetworkError as error:
        not_fetched(error)
    command = [sys.executable, ROOT / "benchmarks" / "tuning.py", "--tokens", "120"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()[1:]
    assert [line[:24].strip() for line in lines][-1] == "+ packed rows"
    assert all(float(line[24:].split()[0]) > 0 for line in lines)
