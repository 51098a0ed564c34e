"""Two ranks, killed in mid-epoch, gone on with by one: the same data in the same order, each example once an epoch."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import save_tiny_models, save_tones, tiny_config

from ultravox.data.audit import audit_records, compare_orders
from ultravox.data.sample_log import read_sample_logs
from ultravox.files import atomic_write
from ultravox.training.audit import expected_of, stage_tasks
from ultravox.training.trackers.samples import samples_folder

SCRIPT = Path(__file__).with_name("train_rank.py")
LAST_STEP = 16
KILL_AT = 8  # the last checkpoint is two steps old then


@pytest.fixture(scope="module")
def config_path(tmp_path_factory):
    """Of a stage with an epoch of a few steps, of four batches each."""
    folder = tmp_path_factory.mktemp("order")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ULTRAVOX_HOME", str(folder / "home"))
        content = tiny_config(save_tiny_models(folder), save_tones(folder / "tones"), folder / "run").model_dump()
        stage = content["stages"][1] | {"max_steps": LAST_STEP, "max_batch_tokens": 110, "accumulation_steps": 4}
        content["stages"] = [stage]
        config = type(tiny_config((folder, folder), folder, folder)).model_validate(content)
        path = folder / "config.json"
        atomic_write(path, config.model_dump_json())
        yield path


def run(config_path, folder, *, ranks, workers, attempt=0, kill_at=0):
    """Exit codes of all ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, SCRIPT, config_path, folder, attempt, workers, LAST_STEP, kill_at]
    processes = []
    for rank in range(ranks):
        places = {"RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | {name: str(value) for name, value in places.items()}
        environment["ULTRAVOX_HOME"] = str(config_path.parent / "home")
        processes.append(subprocess.Popen([*map(str, command)], env=environment, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=240)[1] for process in processes]
    codes = [process.returncode for process in processes]
    assert kill_at or codes == [0] * ranks, errors
    return codes


@pytest.fixture(scope="module")
def undisturbed(config_path, tmp_path_factory):
    """The folder of a run of one process, from its beginning to its end."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run(config_path, folder, ranks=1, workers=0)
    return folder


@pytest.fixture(scope="module")
def audited(config_path):
    """Folder of a run → its audit."""
    from ultravox.config.schema import RunConfig

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ULTRAVOX_HOME", str(config_path.parent / "home"))
        ((name, task),) = stage_tasks(RunConfig.model_validate_json(config_path.read_text()))
    expected = expected_of(task)
    return lambda folder: audit_records(read_sample_logs(samples_folder(folder, name)), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_on_two_ranks_and_resumed_on_one(config_path, undisturbed, audited, tmp_path, workers):
    codes = run(config_path, tmp_path, ranks=2, workers=workers, kill_at=KILL_AT)
    assert codes == [-signal.SIGKILL] * 2
    before = audited(tmp_path)
    assert before.num_ranks == 2
    run(config_path, tmp_path, ranks=1, workers=workers, attempt=1)

    report = audited(tmp_path)
    assert report.ok, report.checks
    assert len(report.epochs) >= 3, "at least two epochs must be whole"
    assert report.num_attempts == 2
    assert report.num_superseded > 0, "steps after the checkpoint were made a second time"
    coverage = next(check for check in report.checks if check.name == "coverage")
    assert coverage.passed is True
    assert before.epochs[-1] < report.epochs[-1], "it was killed before the last epoch"
    assert compare_orders({"undisturbed": audited(undisturbed), "killed": report}).passed is True


def test_the_audit_tells_a_lost_rank(config_path, undisturbed, audited, tmp_path):
    """As when a dataset is split twice: the log of one rank alone holds half of the micro-batches."""
    run(config_path, tmp_path, ranks=2, workers=0)
    assert audited(tmp_path).ok
    (samples_folder(tmp_path, "tune") / "samples-rank1.jsonl").unlink()
    failed = {check.name for check in audited(tmp_path).checks if check.passed is False}
    assert {"coverage", "steps"} <= failed
