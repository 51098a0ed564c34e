"""``ultravox azureml submit``: check a job file, send it, say where to watch it."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ultravox.errors import ConfigError

if TYPE_CHECKING:
    from ultravox.clusters.azureml_client import Workspace

HELP = (
    "Check an AzureML job file and send it. The workspace is that of a config.json in this folder or above it, or the "
    "one that the options name. Who you are comes from `az login`. Needs the extra azure."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The file, the workspace, and --dry-run."""
    parser.add_argument("job", metavar="FILE", type=Path, help="the job file, such as azureml/configs/smoke.yml")
    parser.add_argument("--subscription", metavar="ID", help="the subscription of the workspace")
    parser.add_argument("--resource-group", metavar="NAME", help="the resource group of the workspace")
    parser.add_argument("--workspace", metavar="NAME", help="the workspace")
    parser.add_argument("--dry-run", action="store_true", help="check the file and send nothing")


def run(args: argparse.Namespace) -> int:
    """Check, send, print the address of the job's page."""
    from ultravox.cli.azureml.checking import require_valid
    from ultravox.clusters import azureml_client

    workspace = _workspace(args)
    checked_by = require_valid(args.job)
    if args.dry_run:
        print(f"job    {args.job}, checked by {checked_by}; nothing was sent")
        return 0
    sent = azureml_client.send(args.job, azureml_client.connect(workspace))
    print(f"job    {sent.name}")
    print(f"studio {sent.studio_url}")
    return 0


def _workspace(args: argparse.Namespace) -> "Workspace | None":
    from ultravox.clusters.azureml_client import Workspace

    given = {name: getattr(args, name) for name in ("subscription", "resource_group", "workspace")}
    lacking = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is None]
    if len(lacking) == len(given):
        return None
    if lacking:
        raise ConfigError(f"a workspace has three names; {', '.join(lacking)} is missing")
    return Workspace(args.subscription, args.resource_group, args.workspace)
