"""``ultravox checkpoint verify``: whether training checkpoints are as they were written."""

import argparse
from pathlib import Path

HELP = "Hold the files of a run's checkpoints, or of one, against their hashes. Exit code 2 if one is damaged."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoint or run."""
    parser.add_argument("path", metavar="PATH", type=Path, help="a run folder, or one of its checkpoints/STAGE-STEP")


def run(args: argparse.Namespace) -> int:
    """A line for each."""
    from ultravox.errors import CheckpointError
    from ultravox.training.checkpoint import load_checkpoint
    from ultravox.training.checkpoint_tools import find_checkpoints

    damaged = 0
    for folder in find_checkpoints(args.path):
        try:
            load_checkpoint(folder)
        except CheckpointError as error:
            damaged += 1
            print(f"DAMAGED  {folder}: {error}")
        else:
            print(f"whole    {folder}")
    return 2 if damaged else 0
