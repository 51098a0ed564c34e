"""``ultravox checkpoint convert``: a model of one checkpoint, such as of a run that is not over."""

import argparse
from pathlib import Path

HELP = "Write the model that a training checkpoint holds, in the public form that every other command takes."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoint or run, and where to."""
    parser.add_argument("path", metavar="PATH", type=Path, help="a checkpoint, or a run folder, whose newest is taken")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="folder of the model; must be new")


def run(args: argparse.Namespace) -> int:
    """Load and write."""
    from ultravox.training.checkpoint import load_checkpoint
    from ultravox.training.checkpoint_tools import find_checkpoints, write_model

    folder = find_checkpoints(args.path)[-1]
    checkpoint = load_checkpoint(folder)
    write_model(checkpoint.trainable, checkpoint.state, args.output)
    print(f"model  {args.output}, of {folder.name}")
    return 0
