"""What the tests of jobs share: packages that may be missing, and an `ultravox` that notes how it was called."""

import json
import os
import stat
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: Joins a process group, adds up the ranks, and writes what it saw. With WAIT it sleeps until SIGTERM, then "saves".
RECORDER = """
import json, os, signal, sys, time
import torch
import torch.distributed as distributed

seen = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
distributed.init_process_group("gloo")
number = torch.ones(1) * (distributed.get_rank() + 1)
distributed.all_reduce(number)
distributed.destroy_process_group()
name = os.path.join(os.environ["RECORDS"], seen["RANK"])

def save(number, frame):
    time.sleep(1)
    open(name + ".saved", "w").close()
    sys.exit(128 + number)

if os.environ.get("WAIT"):
    signal.signal(signal.SIGTERM, save)
with open(name + ".new", "w") as file:
    json.dump({"words": sys.argv[1:], "sum": float(number), **seen}, file)
os.rename(name + ".new", name + ".json")
if os.environ.get("WAIT"):
    time.sleep(60)
"""


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


def require(module: str, package: str) -> None:
    """Skip without a package only where ULTRAVOX_WITHOUT names it; else a missing one is a failure."""
    top = module.partition(".")[0]
    if find_spec(top) is not None and (top == module or find_spec(module) is not None):
        return
    if package in os.environ.get("ULTRAVOX_WITHOUT", "").split(","):
        pytest.skip(f"ULTRAVOX_WITHOUT names {package}")
    pytest.fail(f"{package} is not installed; set ULTRAVOX_WITHOUT={package} to go without what it checks")


@pytest.fixture(scope="session")
def azure_sdk() -> None:
    """Whatever needs azure-ai-ml."""
    require("azure.ai.ml", "azure-ai-ml")


@pytest.fixture(scope="session")
def kubeflow_models():
    """The models of Kubeflow Trainer's API."""
    require("kubeflow_trainer_api", "kubeflow-trainer-api")
    import kubeflow_trainer_api.models

    return kubeflow_trainer_api.models


@pytest.fixture(scope="session")
def skypilot_python() -> str:
    """A Python that has SkyPilot."""
    if named := os.environ.get("ULTRAVOX_SKYPILOT_PYTHON"):
        return named
    require("sky", "skypilot")
    return sys.executable


@pytest.fixture
def recorder(tmp_path):
    """An environment whose `python -m ultravox` is RECORDER with this Python's torchrun; and what reads its records."""
    package = tmp_path / "recorder" / "ultravox"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(RECORDER)
    records = tmp_path / "records"
    records.mkdir()
    bin_folder = tmp_path / "bin"
    write_program(bin_folder / "torchrun", f'exec "{sys.executable}" -m torch.distributed.run "$@"')
    environment = {
        **os.environ,
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "PYTHONPATH": str(package.parent),
        "RECORDS": str(records),
        "OMP_NUM_THREADS": "1",
    }

    def read() -> list[dict]:
        return [json.loads(path.read_text()) for path in sorted(records.glob("*.json"))]

    return environment, read


def write_program(path: Path, text: str) -> None:
    """A shell program that can be run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def program():
    """`program(path, text)` writes a shell program."""
    return write_program
