"""The only module that touches Azure's SDK: validating a job file with it, and sending one.

`connect` is the seam: whatever it returns needs `jobs.create_or_update(job)`, so that a test puts its own in its place.
azure-ai-ml (the extra `azure`) is imported inside the functions, since it takes seconds.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ultravox.errors import ConfigError, NetworkError, UltravoxError


class Jobs(Protocol):
    """What sends a job."""

    def create_or_update(self, job: Any) -> Any:
        """Send it; the job that comes back has a `name` and a `studio_url`."""


class Client(Protocol):
    """A workspace, as far as it is used here; the SDK's MLClient is one."""

    jobs: Jobs


@dataclass(frozen=True)
class Workspace:
    """Where jobs go."""

    subscription: str
    resource_group: str
    name: str


@dataclass(frozen=True)
class SentJob:
    """What there is to say about a job that was sent."""

    name: str
    studio_url: str


def is_installed() -> bool:
    """Whether the SDK is there; does not import it."""
    from importlib.util import find_spec

    try:
        return find_spec("azure.ai.ml") is not None
    except ModuleNotFoundError:  # not even the package around it
        return False


def find_sdk_mistakes(path: Path) -> list[str]:
    """What the SDK finds wrong with a job file, a line each: unknown keys, wrong types, and what it cannot send."""
    load_job = _sdk().load_job
    try:
        job = load_job(path)
        result = job._validate()
        if not result.passed:
            return [f"{key}: {' '.join(str(message).split())}" for key, message in result.error_messages.items()]
        # what is sent; environment and code are uploaded first, so their places in it are filled here
        command = job._to_job()
        command.environment, command.code = "azureml:placeholder:1", "azureml:placeholder:1"
        command._to_rest_object()
    except Exception as error:  # the SDK raises half a dozen kinds for a file that is wrong
        return [_plain(error)]
    return []


def connect(workspace: Workspace | None) -> Client:
    """A client for the workspace, or for the one that a config.json here or in a folder above names.

    Raises:
        ConfigError: no workspace is given and no config.json is found.
    """
    client = _sdk().MLClient
    from azure.identity import DefaultAzureCredential

    credential = DefaultAzureCredential()
    if workspace is not None:
        return client(credential, workspace.subscription, workspace.resource_group, workspace.name)
    try:
        return client.from_config(credential)
    except Exception as error:
        raise ConfigError(
            "no workspace: give --subscription, --resource-group and --workspace, or download the workspace's "
            f"config.json into this folder ({_plain(error)})"
        ) from error


def send(path: Path, client: Client) -> SentJob:
    """Send a job file that was checked.

    Raises:
        NetworkError: Azure cannot be reached, or does not know who asks.
        UltravoxError: it refuses the job.
    """
    load_job = _sdk().load_job
    from azure.core.exceptions import AzureError, ClientAuthenticationError, ServiceRequestError

    try:
        job = client.jobs.create_or_update(load_job(path))
    except ClientAuthenticationError as error:
        raise NetworkError(f"Azure does not know who asks: run `az login` first ({_plain(error)})") from error
    except ServiceRequestError as error:
        raise NetworkError(f"Azure cannot be reached ({_plain(error)})") from error
    except AzureError as error:  # also the SDK's own kinds
        raise UltravoxError(f"AzureML refused the job: {_plain(error)}") from error
    return SentJob(str(job.name), str(job.studio_url))


def _sdk() -> Any:
    """azure.ai.ml, imported now."""
    if not is_installed():
        raise ConfigError("azure-ai-ml is not installed: pip install 'ultravox[azure]'")
    import azure.ai.ml

    # which of its own classes and fields are experimental, it tells in ten lines for every file
    for module in ("_utils._experimental", "_schema.core.fields"):
        logging.getLogger(f"azure.ai.ml.{module}").setLevel(logging.ERROR)
    return azure.ai.ml


def _plain(error: Exception) -> str:
    """The first sentences of the SDK's message, which goes on for a page, without colours and boxes."""
    import re

    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())
    return text if len(text) <= 400 else f"{text[:400]}…"
