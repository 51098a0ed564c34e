"""AzureML job files: read, filled in from a run's config and a few options, written.

A job file that ships is the template: what the options do not name stays as it is there, comments excepted.
"""

import os
import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

import yaml

from ultravox.errors import ConfigError
from ultravox.files import atomic_write

Job = dict[str, Any]

_TRAIN = re.compile(r"-m ultravox train \S+.*?(?=\s--run_dir\s)", flags=re.DOTALL)


@dataclass(frozen=True)
class JobOptions:
    """What differs from the template; None leaves the template's word."""

    compute: str | None = None
    """Name of a cluster. It excludes the next two."""
    instance_type: str | None = None
    """Size of the machines, without a cluster."""
    tier: str | None = None
    """spot, basic, standard or premium."""
    nodes: int | None = None
    gpus_per_node: int | None = None
    """Processes on a machine, one for each device."""
    experiment: str | None = None
    environment: str | None = None
    """A registered environment in the place of the image that is built: azureml:NAME:VERSION."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Path of each input: a folder here, azureml:NAME@latest, or azureml://…"""
    ssh_public_key: str | None = None
    key_vault_url: str | None = None
    timeout_seconds: int | None = None


def read_job(path: Path) -> Job:
    """A job file's content.

    Raises:
        ConfigError: it is missing, no YAML, or no command job.
    """
    try:
        job = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such job file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a text file ({error})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{place}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(job, dict) or job.get("type", "command") != "command":
        raise ConfigError(f"{path}: expected an AzureML command job (type: command)")
    return job


def fill(template: Job, template_folder: Path, config: Path, options: JobOptions, overrides: Sequence[str] = ()) -> Job:
    """A job that trains another config, and is what the options say; its paths still begin at the template's folder.

    Args:
        config: inside the template's code folder: only that goes with the job.
        overrides: `--key value` words for the training, checked by the caller.

    Raises:
        ConfigError: an option does not fit the template.
    """
    job = deepcopy(template)
    root = (template_folder / str(job.get("code", "."))).resolve()
    if not config.resolve().is_relative_to(root):
        raise ConfigError(f"{config} is not inside {root}, the folder that goes with the job: put it there")
    job["command"] = _command(job, config.resolve().relative_to(root), overrides)
    job["display_name"] = config.stem
    job["description"] = f"Trains {config.stem}."
    _place(job, options)
    if options.experiment is not None:
        job["experiment_name"] = options.experiment
    if options.environment is not None:
        job["environment"] = options.environment
    for name, path in options.inputs.items():
        if name not in (known := job.get("inputs", {})):
            raise ConfigError(f"--input {name}: the template has no such input ({', '.join(known) or 'none'})")
        job["inputs"][name]["path"] = path
    if options.ssh_public_key is not None:
        job.setdefault("services", {})["shell"] = {
            "type": "ssh",
            "ssh_public_keys": options.ssh_public_key.strip(),
            "nodes": "all",
        }
    if options.key_vault_url is not None:
        job.setdefault("environment_variables", {})["AZURE_KEY_VAULT_URL"] = options.key_vault_url
    if options.timeout_seconds is not None:
        job["limits"] = {"timeout": options.timeout_seconds}
    return job


def _place(job: Job, options: JobOptions) -> None:
    """Where it runs: a cluster, or machines of a size."""
    resources = job.setdefault("resources", {})
    if options.compute is not None:
        if options.instance_type is not None or options.tier is not None:
            raise ConfigError(
                "--compute names a cluster, which has its own size and tier: drop --instance-type and --tier"
            )
        job["compute"] = options.compute if options.compute.startswith("azureml:") else f"azureml:{options.compute}"
        job.pop("queue_settings", None)
        resources.pop("instance_type", None)
    if options.instance_type is not None:
        job.pop("compute", None)
        resources["instance_type"] = options.instance_type
        job.pop("services", None)  # AzureML documents them for clusters
    if options.tier is not None:
        job["queue_settings"] = {"job_tier": options.tier}
    if options.nodes is not None:
        resources["instance_count"] = options.nodes
    if options.gpus_per_node is not None:
        job["distribution"] = {"type": "pytorch", "process_count_per_instance": options.gpus_per_node}


def _command(job: Job, config: Path, overrides: Sequence[str]) -> str:
    """The template's command with another config, its overrides, and a folder of the run's own name."""
    command = " ".join(str(job.get("command", "")).split())
    found = _TRAIN.search(command)
    if found is None:
        raise ConfigError("the template's command holds no `-m ultravox train CONFIG … --run_dir FOLDER`")
    # the template's own overrides go: they are of its config
    train = " ".join(["-m ultravox train", quote(config.as_posix()), *map(quote, overrides)])
    command = command[: found.start()] + train + command[found.end() :]
    return re.sub(r"(\$\{\{outputs\.\w+\}\})/[\w.-]+", rf"\1/{config.stem}", command)


def moved(job: Job, old_folder: Path, new_folder: Path) -> Job:
    """The job for a file in another folder: its code and its image's context seen from there."""
    job = deepcopy(job)
    if "code" in job:
        job["code"] = _seen_from(new_folder, old_folder / str(job["code"]))
    environment = job.get("environment")
    if isinstance(environment, dict) and isinstance(build := environment.get("build"), dict):
        build["path"] = _seen_from(new_folder, old_folder / str(build.get("path", ".")))
    return job


def _seen_from(folder: Path, target: Path) -> str:
    return Path(os.path.relpath(target.resolve(), folder.resolve())).as_posix()


def write_job(job: Job, path: Path) -> None:
    """The file, whole or not at all."""
    text = yaml.safe_dump(job, sort_keys=False, allow_unicode=True, width=120)
    atomic_write(path, f"# Written by `ultravox azureml render`. Send it with `ultravox azureml submit`.\n{text}")
