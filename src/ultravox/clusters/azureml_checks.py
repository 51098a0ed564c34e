"""What AzureML's own validator lets through in a command job, each found before anything is sent.

The SDK checks keys and types; the rest it leaves to the service, which answers after the upload and the build of the
image, or to the job, which dies on its machines.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ultravox.clusters import training_command

Job = dict[str, Any]

#: `services.*.type` of a job file; any other word is loaded as a custom service that never starts.
SERVICE_TYPES = ("vs_code", "tensor_board", "jupyter_lab", "ssh")

#: The number and unit that Docker takes, as the SDK's schema describes but does not check.
_SHM_SIZE = re.compile(r"[1-9]\d*[bkmg]")
_REFERENCE = re.compile(r"\$\{\{\s*(\w+)\.(\w+)\s*\}\}")
_SECRET = re.compile(r"(TOKEN|SECRET|PASSWORD|API_?KEY|ACCESS_?KEY|ACCOUNT_KEY|CONNECTION_STRING|CREDENTIALS?)$")

#: Devices of the sizes with NVIDIA GPUs that training is likely to use, as Azure's list of sizes names them.
GPUS_PER_INSTANCE = {
    "standard_nc4as_t4_v3": 1,
    "standard_nc64as_t4_v3": 4,
    "standard_nc24ads_a100_v4": 1,
    "standard_nc48ads_a100_v4": 2,
    "standard_nc96ads_a100_v4": 4,
    "standard_nd96asr_v4": 8,
    "standard_nd96amsr_a100_v4": 8,
    "standard_nc40ads_h100_v5": 1,
    "standard_nc80adis_h100_v5": 2,
    "standard_nd96isr_h100_v5": 8,
    "standard_nd96isr_h200_v5": 8,
}


def find_mistakes(job: Job, folder: Path) -> list[str]:
    """What is wrong with a job file, a line each; empty when it will do.

    Args:
        job: the file's content.
        folder: the folder of the file: its paths begin there.
    """
    return [
        *_environment_mistakes(job, folder),
        *_compute_mistakes(job),
        *_resource_mistakes(job),
        *_service_mistakes(job),
        *_reference_mistakes(job),
        *_process_mistakes(job),
        *_command_mistakes(job, folder),
        *_secret_mistakes(job),
    ]


def _section(job: Job, key: str) -> Job:
    value = job.get(key)
    return value if isinstance(value, dict) else {}


def _environment_mistakes(job: Job, folder: Path) -> Iterator[str]:
    environment = job.get("environment")
    ways = "environment: azureml:NAME:VERSION, or {image: …}, or {build: {path: …, dockerfile_path: …}}"
    if not environment:
        yield f"environment is empty: the job has no image to run in; write {ways}"
        return
    if isinstance(environment, str):
        return
    build, image = environment.get("build"), environment.get("image")
    if bool(build) == bool(image):
        yield f"environment has {'both image and build' if build else 'neither image nor build'}: write {ways}"
        return
    if image:
        return
    if not isinstance(build, dict) or not build.get("path"):
        yield "environment.build has no path: name the folder that the image is built from"
        return
    dockerfile = folder / str(build["path"]) / str(build.get("dockerfile_path", "Dockerfile"))
    if not dockerfile.is_file():
        yield f"environment.build: no Dockerfile at {dockerfile}: dockerfile_path begins at environment.build.path"


def _compute_mistakes(job: Job) -> Iterator[str]:
    compute, size = job.get("compute"), _section(job, "resources").get("instance_type")
    if not compute and not size:
        yield "neither compute nor resources.instance_type: name a cluster (compute: azureml:NAME) or a machine size"
    if compute and size:
        yield f"compute {compute} and resources.instance_type {size}: a cluster's size is its own, drop one of the two"
    tier = _section(job, "queue_settings").get("job_tier")
    if compute and tier:
        yield f"queue_settings.job_tier {tier} has no effect with compute {compute}, which has its own; drop one"


def _resource_mistakes(job: Job) -> Iterator[str]:
    resources = _section(job, "resources")
    size = resources.get("shm_size")
    if size is not None and not _SHM_SIZE.fullmatch(str(size)):
        yield f"resources.shm_size is {size!r}: write a whole number and one of b, k, m, g, such as 64g"
    if size is None:
        yield "resources.shm_size is missing: Docker's 64 MB are too little for the workers that load data; write 64g"


def _service_mistakes(job: Job) -> Iterator[str]:
    for name, service in _section(job, "services").items():
        kind = service.get("type") if isinstance(service, dict) else None
        if kind not in SERVICE_TYPES:
            yield f"services.{name}.type is {kind!r}: choose from {', '.join(SERVICE_TYPES)}"
        elif service.get("nodes") not in (None, "all"):
            yield f"services.{name}.nodes is {service['nodes']!r}: write all, or leave it out for the first machine"


def _reference_mistakes(job: Job) -> Iterator[str]:
    texts = {"command": str(job.get("command", ""))}
    texts |= {
        f"environment_variables.{key}": str(value) for key, value in _section(job, "environment_variables").items()
    }
    for place, text in texts.items():
        for kind, name in _REFERENCE.findall(text):
            known = list(_section(job, kind))
            used = f"{place} uses ${{{{{kind}.{name}}}}}"
            if kind not in ("inputs", "outputs"):
                yield f"{used}: only inputs and outputs have names"
            elif name not in known:
                yield f"{used}, which is not among the job's {kind} ({', '.join(known) or 'none'})"


def _process_mistakes(job: Job) -> Iterator[str]:
    """AzureML starts the processes, or torchrun does: both would start 8 × 8, neither would leave 7 devices idle."""
    try:
        calls = training_command.find_training_calls(str(job.get("command", "")))
    except ValueError:
        return  # _command_mistakes says so
    distribution, resources = _section(job, "distribution"), _section(job, "resources")
    per_instance, instances = distribution.get("process_count_per_instance", 1), resources.get("instance_count", 1)
    torchrun = [call for call in calls if call.torchrun]
    if torchrun and per_instance != 1:
        yield (
            f"the command starts torchrun in each of the {per_instance} processes that AzureML starts on a machine: "
            "call `python -m ultravox train`, or set distribution.process_count_per_instance to 1"
        )
    if instances != 1 and not distribution:
        yield f"{instances} machines without a distribution would train each by itself; write {{type: pytorch}}"
    if distribution and str(distribution.get("type", "")).lower() != "pytorch":
        yield f"distribution.type is {distribution.get('type')!r}: the training reads the variables of pytorch alone"
    for call in torchrun:
        given = {
            word.lstrip("-").partition("=")[0].replace("-", "_") for word in call.launcher if word.startswith("--")
        }
        lacking = {"nnodes", "node_rank", "master_addr", "master_port"} - given
        if instances != 1 and not call.through_script and lacking:
            yield (
                f"torchrun on {instances} machines lacks --{', --'.join(sorted(lacking))}: pass $AZUREML_NODE_COUNT, "
                "$NODE_RANK, $MASTER_ADDR and $MASTER_PORT"
            )
    size = str(resources.get("instance_type", ""))
    devices = GPUS_PER_INSTANCE.get(size.lower())
    if devices and not torchrun and per_instance != devices:
        yield f"distribution.process_count_per_instance is {per_instance}; a {size} has {devices} GPUs: one for each"


def _command_mistakes(job: Job, folder: Path) -> Iterator[str]:
    code = job.get("code")
    if not code:
        yield "code is missing: the job would have no configs; name the repository's folder, seen from this file"
        return
    root = (folder / str(code)).resolve()
    if not root.is_dir():
        yield f"code is {code}, and {root} is no folder: name the repository's folder, seen from this file"
        return
    text = str(job.get("command", ""))
    mistakes = training_command.find_mistakes(text, root, processes_of=lambda call: _num_processes(job, call))
    yield from mistakes
    if not mistakes:
        yield from _mounted_names(text)
    outputs = [name for kind, name in _REFERENCE.findall(text) if kind == "outputs"]
    if not outputs:
        yield "the command writes to none of the outputs: --run_dir must be in ${{outputs.…}} to outlive the machine"


def _num_processes(job: Job, call: training_command.TrainingCall) -> int | None:
    """How many share the run, as AzureML or torchrun starts them; None = the machines decide."""
    distribution, resources = _section(job, "distribution"), _section(job, "resources")
    instances = resources.get("instance_count", 1)
    if not call.torchrun:
        return instances * distribution.get("process_count_per_instance", 1) if distribution else 1
    words = " ".join(call.launcher)
    per_instance = re.search(r"--nproc[-_]per[-_]node[= ](\d+)(?!\S)", words)
    nodes = re.search(r"--nnodes[= ](\S+)", words)
    if per_instance is None or (nodes and nodes[1] not in (str(instances), "$AZUREML_NODE_COUNT")):
        return None
    return int(per_instance[1]) * (instances if nodes else 1)


def _mounted_names(text: str) -> Iterator[str]:
    """Keys of the config that hold an input's folder, which has another name in each job."""
    for call in training_command.find_training_calls(text):
        for key, value in zip(call.words, call.words[1:], strict=False):
            if key.startswith("--") and "${{inputs." in value:
                yield (
                    f"{key} {value}: the next job has it elsewhere, and a run goes on under the same names alone; "
                    "link it to a name of its own, as azureml/configs/audiollm.yml does (ln -sfn)"
                )


def _secret_mistakes(job: Job) -> Iterator[str]:
    for key, value in _section(job, "environment_variables").items():
        if value and _SECRET.search(key.upper()):
            yield (
                f"environment_variables.{key} looks like a secret, and everybody who sees the job could read it: "
                "keep it in a Key Vault (AZURE_KEY_VAULT_URL)"
            )
