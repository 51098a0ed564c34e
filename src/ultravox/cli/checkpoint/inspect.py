"""``ultravox checkpoint inspect``: what training checkpoints hold."""

import argparse
import json
from pathlib import Path

HELP = "Verify the checkpoints of a run, or one, and show where each stands and what it holds."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoint or run."""
    parser.add_argument("path", metavar="PATH", type=Path, help="a run folder, or one of its checkpoints/STAGE-STEP")
    parser.add_argument("--json", action="store_true", help="print one JSON object a checkpoint")


def run(args: argparse.Namespace) -> int:
    """A row for each, or its whole content as JSON."""
    from rich.console import Console
    from rich.table import Table

    from ultravox.training.checkpoint_tools import find_checkpoints, inspect_checkpoint

    found = [inspect_checkpoint(folder) for folder in find_checkpoints(args.path)]
    if args.json:
        for content in found:
            print(json.dumps(content))
        return 0
    table = Table("checkpoint", "step", "epoch", "hours", "trained", "MB", "metrics")
    for content in found:
        count = sum(content["trainable_parameters"].values()) / 1e6
        metrics = ", ".join(f"{name} {value:.3g}" for name, value in list(content["metrics"].items())[:3])
        table.add_row(
            Path(content["folder"]).name,
            f"{content['step']} of {content['max_steps']}",
            str(content["epoch"]),
            f"{content['seconds'] / 3600:.2f}",
            f"{count:.1f} M",
            f"{content['bytes'] / 1e6:.0f}",
            metrics or "–",
        )
    Console().print(table)
    return 0
