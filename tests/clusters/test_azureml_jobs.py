"""The job files that ship: both validators take them, their commands do what they say, and each check can fail."""

import json
import os
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import yaml

from ultravox.clusters.azureml_checks import GPUS_PER_INSTANCE, SERVICE_TYPES, find_mistakes
from ultravox.clusters.azureml_client import find_sdk_mistakes
from ultravox.clusters.azureml_job import read_job
from ultravox.config.load import load_config

CONFIGS = Path(__file__).parents[2] / "azureml" / "configs"
MODES = {"ro_mount": "ReadOnlyMount", "download": "Download"}
KINDS = {"vs_code": "VSCode", "tensor_board": "TensorBoard", "jupyter_lab": "JupyterLab", "ssh": "SSH"}
FILES = sorted(CONFIGS.glob("*.yml"))


@pytest.fixture
def job() -> dict:
    """The two machines of eight GPUs."""
    return read_job(CONFIGS / "audiollm.yml")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_is_valid(path, azure_sdk):
    assert find_mistakes(read_job(path), path.parent) == []
    assert find_sdk_mistakes(path) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_would_be_sent(path, azure_sdk):
    """The request, from the SDK itself."""
    from azure.ai.ml import load_job

    job = load_job(path)
    assert job._validate().passed
    command = job._to_job()
    command.environment, command.code = "azureml:x:1", "azureml:c:1"
    sent = command._to_rest_object().properties
    file = read_job(path)
    assert sent.resources["shmSize"] == file["resources"]["shm_size"]
    assert sent.resources["instanceCount"] == file["resources"]["instance_count"]
    assert dict(sent.distribution) == {
        "distributionType": "PyTorch",
        "processCountPerInstance": file["distribution"]["process_count_per_instance"],
    }
    assert set(sent.inputs) == set(file["inputs"])
    assert {name: entry["mode"] for name, entry in sent.inputs.items()} == {
        name: MODES[entry["mode"]] for name, entry in file["inputs"].items()
    }
    kinds = {name: service["jobServiceType"] for name, service in (sent.services or {}).items()}
    assert kinds == {
        name: {"vs_code": "VSCode", "tensor_board": "TensorBoard", "jupyter_lab": "JupyterLab", "ssh": "SSH"}[
            entry["type"]
        ]
        for name, entry in file.get("services", {}).items()
    }


def test_the_variants_are_there():
    jobs = {path.stem: read_job(path) for path in FILES}
    assert set(jobs) == {"audiollm", "audiollm-serverless", "audiollm-spot", "smoke"}
    assert {service["type"] for service in jobs["audiollm"]["services"].values()} == set(SERVICE_TYPES)
    assert jobs["audiollm"]["resources"]["instance_count"] > 1
    assert jobs["audiollm-spot"]["queue_settings"]["job_tier"] == "spot"
    assert jobs["audiollm-spot"]["outputs"]["runs"]["path"].startswith("azureml://"), "of each job, it could not go on"
    assert jobs["smoke"]["distribution"]["process_count_per_instance"] == 1
    assert "compute" not in jobs["audiollm-serverless"]
    assert all(job["identity"] == {"type": "managed"} for job in jobs.values())


def test_the_service_types_are_the_sdks(azure_sdk):
    from azure.ai.ml.constants._job.job import JobServiceTypeNames

    assert set(SERVICE_TYPES) == set(JobServiceTypeNames.NAMES_ALLOWED_FOR_PUBLIC)


@pytest.mark.parametrize("shell", ["bash", "sh"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_command_goes_on_from_checkpoints(path, shell, tmp_path, program):
    """Really run, by a shell, with folders in the place of AzureML's and a `python` that notes its words."""
    program(
        tmp_path / "bin" / "python",
        f"exec {sys.executable} -c 'import json, os, sys; "
        'print(json.dumps([os.getpid(), os.environ["ULTRAVOX_HOME"], *sys.argv[1:]]))\' "$@"',
    )
    job = read_job(path)
    text = re.sub(r"\$\{\{(\w+)\.(\w+)\}\}", lambda match: f"{tmp_path}/{match[1]}/{match[2]}", job["command"])
    run = tmp_path / "outputs" / "runs" / path.stem
    (run / "checkpoints" / ".half-000001").mkdir(parents=True)

    def words() -> list:
        environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
        process = subprocess.Popen(
            [shell, "-c", text],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, "")
        pid, home, *rest = json.loads(output)
        assert pid == process.pid, "`exec`: a signal to the job's process must reach the training"
        assert home == f"{tmp_path}/inputs/home"
        return rest

    first = words()
    assert first[:3] == ["-m", "ultravox", "train"]
    assert first[-2:] == ["--run_dir", str(run)]
    (run / "checkpoints" / "align-000100").mkdir()
    assert words() == [*first, "--resume"]
    (log_dir,) = [s.get("log_dir") for s in job.get("services", {}).values() if s["type"] == "tensor_board"] or [None]
    if "data" in job["inputs"]:
        (source,) = load_config(CONFIGS.parents[1] / first[3]).data.sources
        assert (tmp_path / source.name).readlink() == tmp_path / "inputs" / "data"
    if log_dir:
        assert (tmp_path / log_dir).readlink() == run / "tensorboard"


def set_at(job: dict, keys: str, value) -> dict:
    """A copy with one value changed; None removes it."""
    job = deepcopy(job)
    *parents, last = keys.split(".")
    section = job
    for key in parents:
        section = section[key]
    if value is None:
        del section[last]
    else:
        section[last] = value
    return job


TORCHRUN = "torchrun --nproc-per-node=8 -m ultravox"
MEETING = "--nnodes=$AZUREML_NODE_COUNT --node_rank=$NODE_RANK --master_addr=$MASTER_ADDR --master_port=$MASTER_PORT"


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        ("environment", {}, "environment is empty"),
        ("environment", None, "environment is empty"),
        ("environment", {"conda_file": "x.yml"}, "neither image nor build"),
        ("environment", {"image": "x:1", "build": {"path": "../.."}}, "both image and build"),
        ("environment.build", {"dockerfile_path": "x"}, "environment.build has no path"),
        ("environment.build.dockerfile_path", "env/Dockerfile", "no Dockerfile at"),
        ("compute", None, "neither compute nor resources.instance_type"),
        ("resources.instance_type", "Standard_ND96isr_H100_v5", "drop one of the two"),
        ("queue_settings", {"job_tier": "spot"}, "has no effect with compute"),
        ("resources.shm_size", "64gb", "resources.shm_size is '64gb'"),
        ("resources.shm_size", "64G", "resources.shm_size is '64G'"),
        ("resources.shm_size", 64, "resources.shm_size is 64"),
        ("resources.shm_size", "0g", "resources.shm_size is '0g'"),
        ("resources.shm_size", None, "resources.shm_size is missing"),
        ("services.code.type", "vscode", "services.code.type is 'vscode'"),
        ("services.code.type", None, "services.code.type is None"),
        ("services.shell.nodes", "first", "services.shell.nodes is 'first'"),
        ("inputs.data", None, "uses ${{inputs.data}}, which is not among the job's inputs (home)"),
        ("outputs", {"other": {"type": "uri_folder"}}, "uses ${{outputs.runs}}, which is not among the job's outputs"),
        ("environment_variables.X", "${{inputs.nothing}}", "environment_variables.X uses ${{inputs.nothing}}"),
        ("environment_variables.X", "${{parent.inputs}}", "only inputs and outputs have names"),
        ("environment_variables.HF_TOKEN", "hf_abc", "environment_variables.HF_TOKEN looks like a secret"),
        ("environment_variables.WANDB_API_KEY", "abc", "environment_variables.WANDB_API_KEY looks like a secret"),
        ("distribution", None, "2 machines without a distribution"),
        ("distribution.type", "mpi", "distribution.type is 'mpi'"),
        ("code", None, "code is missing"),
        ("code", "../../nowhere", "is no folder"),
        ("command", "echo", "runs no `ultravox train CONFIG`"),
        ("command", "ultravox train configs/quickstart.yaml --run_dir r", "writes to none of the outputs"),
        ("command", "ultravox train 'configs/quickstart.yaml", "no shell text"),
    ],
)
def test_each_mistake_is_found_alone(job, keys, value, message):
    mistakes = find_mistakes(set_at(job, keys, value), CONFIGS)
    assert any(message in mistake for mistake in mistakes), mistakes
    assert all("\n" not in mistake for mistake in mistakes)
    assert len(mistakes) == 1 or keys in ("command", "distribution"), mistakes


def test_a_name_that_changes_with_the_job_is_found(job):
    """Resuming compares names: --data.sources.0.name /mnt/first-job is not --data.sources.0.name /mnt/second-job."""
    words = 'configs/audiollm.yaml --data.sources.0.name "${{inputs.data}}"'
    (mistake,) = find_mistakes(set_at(job, "command", job["command"].replace("configs/audiollm.yaml", words)), CONFIGS)
    assert "--data.sources.0.name ${{inputs.data}}: the next job has it elsewhere" in mistake


def test_a_path_like_name_is_no_secret(job):
    assert find_mistakes(set_at(job, "environment_variables.TOKENIZERS_PARALLELISM", "false"), CONFIGS) == []
    assert find_mistakes(set_at(job, "environment_variables.AZURE_KEY_VAULT_URL", "https://example.com"), CONFIGS) == []


def test_either_azureml_or_torchrun_starts_the_processes(job):
    twice = set_at(job, "command", job["command"].replace("python -m ultravox", TORCHRUN))
    (mistake, lacking) = find_mistakes(twice, CONFIGS)
    assert "torchrun in each of the 8 processes" in mistake
    assert "lacks --master_addr, --master_port, --nnodes, --node_rank" in lacking
    once = set_at(twice, "distribution.process_count_per_instance", 1)
    assert find_mistakes(once, CONFIGS) == [lacking]
    met = set_at(once, "command", once["command"].replace("torchrun", f"torchrun {MEETING}"))
    assert find_mistakes(met, CONFIGS) == []


@pytest.mark.parametrize(
    ("keys", "value", "options", "wanted"),
    [
        ("resources.instance_count", 3, "", 24),
        ("distribution.process_count_per_instance", 6, "", 24),
        ("resources.instance_count", 2, "--stages.align.accumulation_steps 8 --stages.tune.accumulation_steps 24", 16),
        ("distribution.process_count_per_instance", 1, "", None),
    ],
)
def test_the_batches_of_a_step_are_shared_evenly(job, keys, value, options, wanted):
    """16 of them, in both stages, over all processes."""
    job = set_at(job, "command", job["command"].replace("audiollm.yaml", f"audiollm.yaml {options}"))
    mistakes = find_mistakes(set_at(job, keys, value), CONFIGS)
    if wanted is None:
        assert mistakes == []
        return
    align, tune = mistakes
    steps, processes = (8, 16) if options else (16, 3 * 8 if keys.startswith("resources") else 2 * 6)
    assert f"stages.align.accumulation_steps is {steps}, over all of the job's {processes} processes" in align
    assert align.endswith(f"pass --stages.align.accumulation_steps {wanted}")
    assert tune.endswith(f"pass --stages.tune.accumulation_steps {32 if options else wanted}")


@pytest.mark.parametrize(
    ("launcher", "processes"),
    [
        ("torchrun --nproc-per-node=3 -m ultravox", 3),
        ("torchrun --nproc_per_node 3 -m ultravox", 3),
        (f"torchrun --nproc-per-node=3 {MEETING} -m ultravox", 6),
        ("torchrun --nproc-per-node=gpu -m ultravox", None),
        ("torchrun --nproc-per-node=3 --nnodes=1:4 -m ultravox", None),
        ("python -m ultravox", None),
    ],
)
def test_torchruns_processes_are_counted_too(job, launcher, processes):
    """Where the command says how many there are; 16 batches fit 2 and 16 of them, not 3 nor 6."""
    job = set_at(job, "distribution.process_count_per_instance", 1)
    job = set_at(job, "command", job["command"].replace("python -m ultravox", launcher))
    found = [mistake for mistake in find_mistakes(job, CONFIGS) if "accumulation_steps" in mistake]
    assert len(found) == (0 if processes is None else 2)
    assert all(f"the job's {processes} processes" in mistake for mistake in found)


def test_a_process_for_each_device():
    job = read_job(CONFIGS / "audiollm-serverless.yml")
    (mistake,) = find_mistakes(set_at(job, "distribution.process_count_per_instance", 1), CONFIGS)
    assert "is 1; a Standard_ND96isr_H100_v5 has 8 GPUs" in mistake
    assert find_mistakes(set_at(job, "resources.instance_type", "Standard_Unknown_v9"), CONFIGS) == []
    assert {1, 2, 4, 8} == set(GPUS_PER_INSTANCE.values())


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        ("environment", {}),
        ("resources.shm_size", "64gb"),
        ("services.code.type", "vscode"),
        ("compute", None),
        ("environment_variables.HF_TOKEN", "hf_abc"),
    ],
)
def test_the_sdk_alone_would_let_these_through(job, keys, value, tmp_path, azure_sdk):
    """Why our checks exist; when the SDK learns one, this test says that ours can go."""
    broken = set_at(job, keys, value)
    broken["code"] = str(CONFIGS.parents[1])
    if broken["environment"]:
        broken["environment"]["build"]["path"] = str(CONFIGS.parents[1])
    path = tmp_path / "job.yml"
    path.write_text(yaml.safe_dump(broken))
    assert find_sdk_mistakes(path) == []


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        ("resources.instance_counts", 2, "instance_counts"),
        ("distribution.process_count_per_instance", "eight", "Not a valid integer"),
        ("limits.timeout", "long", "Not a valid"),
        ("queue_settings", {"job_tier": "cheap"}, "job_tier"),
    ],
)
def test_the_sdk_finds_the_rest_in_one_line(job, keys, value, message, tmp_path, azure_sdk):
    broken = set_at(job, keys, value)
    broken["code"] = broken["environment"]["build"]["path"] = str(CONFIGS.parents[1])
    path = tmp_path / "job.yml"
    path.write_text(yaml.safe_dump(broken))
    (mistake,) = find_sdk_mistakes(path)
    assert message in mistake
    assert "\n" not in mistake


def test_the_image_has_the_torch_of_the_lock(root):
    text = (root / "azureml" / "env" / "Dockerfile").read_text()
    (base,) = re.findall(r"^FROM (\S+)", text, flags=re.MULTILINE)
    (locked,) = re.findall(r"^torch==(\S+)", (root / "requirements-torch.lock").read_text(), flags=re.MULTILINE)
    assert re.fullmatch(rf"pytorch/pytorch:{re.escape(locked)}-cuda[\d.]+-cudnn\d+-runtime", base), base


def test_the_image_copies_what_is_there_and_sent(root):
    """A COPY of a file that the ignore files keep back would end the build."""
    text = (root / "azureml" / "env" / "Dockerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (.*) \S+$", text, flags=re.MULTILINE) for name in line.split()]
    assert {"requirements.lock", "requirements-torch.lock", "pyproject.toml", "src"} <= set(copied)
    assert all((root / name).exists() for name in copied)
    for ignore in (".amlignore", ".dockerignore"):
        ignored = {line.strip("/*\n") for line in (root / ignore).read_text().splitlines() if not line.startswith("#")}
        assert not ignored & set(copied)
        assert ".git" in ignored


def test_what_is_uploaded(root, azure_sdk):
    """By the SDK's own reading of .amlignore."""
    from azure.ai.ml._utils._asset_utils import get_ignore_file

    ignore = get_ignore_file(root)
    for name in (
        ".git/HEAD",
        "src/ultravox/__pycache__/x.pyc",
        ".venv/bin/python",
        "runs/a/model",
        "tests/conftest.py",
    ):
        assert ignore.is_file_excluded(root / name), name
    for name in (
        "configs/audiollm.yaml",
        "src/ultravox/training/run.py",
        "src/ultravox/data/clip.py",
        "launch/torchrun.sh",
    ):
        assert not ignore.is_file_excluded(root / name), name
