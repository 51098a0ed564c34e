"""``ultravox checkpoint average``: one model of several checkpoints of a run."""

import argparse
from pathlib import Path

HELP = "Average the weights of a stage's newest checkpoints, and write a model of them that every other command takes."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run or checkpoints, how many, and where to."""
    parser.add_argument("paths", metavar="PATH", nargs="+", type=Path, help="a run folder, or two checkpoints or more")
    parser.add_argument("--last", metavar="N", type=int, help="of a run: its newest N (default: all of its last stage)")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="folder of the model; must be new")


def run(args: argparse.Namespace) -> int:
    """Load, average, write."""
    from ultravox.errors import UltravoxError
    from ultravox.training.checkpoint import load_checkpoint
    from ultravox.training.checkpoint_tools import average, find_checkpoints, write_model

    if args.last is not None and (args.last < 2 or len(args.paths) > 1):
        raise UltravoxError(f"--last {args.last} with {len(args.paths)} path(s): expected 2 or more, of one run folder")
    found = [folder for path in args.paths for folder in find_checkpoints(path)]
    if len(args.paths) == 1:
        stage = found[-1].name.rpartition("-")[0]
        found = [folder for folder in found if folder.name.rpartition("-")[0] == stage][-(args.last or 0) :]
    if len(found) < max(2, args.last or 2):
        raise UltravoxError(
            f"{args.paths[0]} holds {len(found)} checkpoint(s) of its last stage, expected {max(2, args.last or 2)}: "
            "keep more with checkpoints.keep_last and stages.<name>.checkpoint_every"
        )
    loaded = [load_checkpoint(folder) for folder in found]
    write_model(average(loaded), loaded[-1].state, args.output)
    print(f"model  {args.output}, the mean of {', '.join(folder.name for folder in found)}")
    return 0
