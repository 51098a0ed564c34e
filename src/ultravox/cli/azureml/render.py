"""``ultravox azureml render``: an AzureML job file for a run's config."""

import argparse
from pathlib import Path

from ultravox.errors import ConfigError

HELP = (
    "Write an AzureML job file that trains CONFIG. A job file is the template; the options change it, and keys of the "
    "config go to the training. The file is checked as `ultravox azureml submit` checks it; nothing is sent."
)
TAKES_OVERRIDES = True
TEMPLATE = Path("azureml/configs/audiollm.yml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The config, the file to write, and what differs from the template."""
    parser.usage = (
        "ultravox azureml render CONFIG --output FILE [--template FILE] [--nodes N]\n"
        "       [--compute NAME | --instance-type SIZE [--tier T]] [--gpus-per-node N]\n"
        "       [--experiment NAME] [--input NAME=PATH …] [--environment NAME]\n"
        "       [--ssh-public-key FILE] [--key-vault-url URL] [--timeout SECONDS] [--KEY VALUE …]"
    )
    parser.add_argument("config", metavar="CONFIG", type=Path, help="YAML file of the run, inside the repository")
    parser.add_argument("--output", metavar="FILE", type=Path, required=True, help="the job file to write")
    parser.add_argument("--template", metavar="FILE", type=Path, default=TEMPLATE, help=f"by default {TEMPLATE}")
    parser.add_argument("--compute", metavar="NAME", help="the cluster")
    parser.add_argument("--instance-type", metavar="SIZE", help="machines of this size, without a cluster")
    parser.add_argument("--tier", choices=("spot", "basic", "standard", "premium"), help="without a cluster")
    parser.add_argument("--nodes", metavar="N", type=int, help="number of machines")
    parser.add_argument("--gpus-per-node", metavar="N", type=int, help="processes on each, one for a device")
    parser.add_argument("--experiment", metavar="NAME", help="the experiment that the job is listed under")
    parser.add_argument(
        "--input",
        metavar="NAME=PATH",
        action="append",
        default=[],
        help="an input's path: a folder, azureml:NAME@latest or azureml://…; several times",
    )
    parser.add_argument("--environment", metavar="NAME", help="azureml:NAME:VERSION, instead of building the image")
    parser.add_argument("--ssh-public-key", metavar="FILE", type=Path, help="a key that may log in while it runs")
    parser.add_argument("--key-vault-url", metavar="URL", help="where the job reads its secrets")
    parser.add_argument("--timeout", metavar="SECONDS", type=int, help="end the job after so long")


def run(args: argparse.Namespace) -> int:
    """Fill the template, check the result, write it."""
    from ultravox.cli.azureml.checking import require_valid
    from ultravox.clusters.azureml_job import JobOptions, fill, moved, read_job, write_job
    from ultravox.config.load import load_config

    load_config(args.config, args.overrides)  # its mistakes are told before those of the job
    for name in ("nodes", "gpus_per_node", "timeout"):
        if (number := getattr(args, name)) is not None and number < 1:
            raise ConfigError(f"--{name.replace('_', '-')} takes a number from 1, got {number}")
    options = JobOptions(
        compute=args.compute,
        instance_type=args.instance_type,
        tier=args.tier,
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node,
        experiment=args.experiment,
        environment=args.environment,
        inputs=_inputs(args.input),
        ssh_public_key=_public_key(args.ssh_public_key),
        key_vault_url=args.key_vault_url,
        timeout_seconds=args.timeout,
    )
    folder = args.template.parent
    job = fill(read_job(args.template), folder, args.config, options, args.overrides)
    unchecked = args.output.with_name(f".unchecked-{args.output.name}")  # its paths begin in the same folder
    try:
        write_job(moved(job, folder, args.output.parent), unchecked)
        checked_by = require_valid(unchecked, shown=args.output)
        unchecked.replace(args.output)
    finally:
        unchecked.unlink(missing_ok=True)
    print(f"job    {args.output}, checked by {checked_by}")
    print(f"next   ultravox azureml submit {args.output}")
    return 0


def _inputs(words: list[str]) -> dict[str, str]:
    inputs = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not (name and equals and path):
            raise ConfigError(f"--input takes NAME=PATH, such as data=azureml:audiollm@latest, got {word!r}")
        local = "://" not in path and not path.startswith("azureml:")
        if local and not Path(path).is_dir():
            raise ConfigError(f"--input {name}: {path} is no folder here (in the cloud: azureml:NAME@latest)")
        inputs[name] = str(Path(path).resolve()) if local else path
    return inputs


def _public_key(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--ssh-public-key {path}: cannot be read ({error})") from None
    if "PRIVATE KEY" in text or not text.startswith(("ssh-", "ecdsa-", "sk-")):
        raise ConfigError(f"--ssh-public-key {path}: no public key (one line that begins with ssh-, ecdsa- or sk-)")
    return text
