"""``ultravox train``: one run, as its config file says."""

import argparse
import sys
from pathlib import Path

HELP = "Train a model as a config file says; any key of it can be overridden on the command line."
TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The config file, --resume and --overwrite; every other --key is a key of the config."""
    parser.usage = "ultravox train CONFIG [--resume | --overwrite] [--init-from PATH] [--KEY VALUE …]"
    parser.add_argument(
        "config", metavar="CONFIG", type=Path, help="YAML file of the run, such as configs/quickstart.yaml"
    )
    parser.add_argument(
        "--init-from",
        "--init_from",
        metavar="PATH",
        help="begin with the weights of another run, a checkpoint or a saved model (the key init_from)",
    )
    before = parser.add_mutually_exclusive_group()
    before.add_argument(
        "--resume", action="store_true", help="go on from the run's last checkpoint, exactly as if it had not stopped"
    )
    before.add_argument("--overwrite", action="store_true", help="replace a run that is in the folder already")


def run(args: argparse.Namespace) -> int:
    """Load the config, train, and say what comes next."""
    from ultravox.config.load import load_config

    start = [] if args.init_from is None else ["--init_from", args.init_from]
    config = load_config(args.config, [*args.overrides, *start])

    from ultravox.training.engines.ranks import is_main_process
    from ultravox.training.interrupt import TrainingInterrupted
    from ultravox.training.run import run_training

    try:
        run_training(config, resume=args.resume, overwrite=args.overwrite)
    except TrainingInterrupted as interruption:
        print(f"ultravox: {interruption}", file=sys.stderr)
        return interruption.exit_code
    if is_main_process():
        _print_next(Path(config.run_dir))
    return 0


def _print_next(run_dir: Path) -> None:
    """Where the model is, and what is done with one."""
    from shlex import quote

    print(f"model  {run_dir / 'model'}")
    print(f"next   ultravox evaluate {quote(str(run_dir))}")
    print(f"       ultravox ask {quote(str(run_dir))} --audio FILE")


def epilog() -> str:
    """Every key of the config, from the schema."""
    import textwrap

    from ultravox.config.load import describe_keys

    lines = ["keys (stages by name: --stages.tune.max_steps 10):"]
    for key in describe_keys():
        if key.is_section:
            lines.append(f"\n  {key.path}: {key.description}")
            continue
        default = "required" if key.default == "required" else f"default {key.default}"
        lines.append(f"  --{key.path.replace('[]', '.NAME')}  {key.type}; {default}")
        lines.extend(textwrap.wrap(key.description, 100, initial_indent="      ", subsequent_indent="      "))
    return "\n".join(lines)
