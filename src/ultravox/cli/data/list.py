"""``ultravox data list``: the datasets that UltraVox knows by name."""

import argparse

HELP = "Show the bundled names."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(args: argparse.Namespace) -> int:
    """Print a table."""
    from ultravox.cli.names import print_table
    from ultravox.data.bundled import DESCRIPTIONS
    from ultravox.data.manifest import read_dataset
    from ultravox.files import ultravox_home

    rows = []
    for name, description in DESCRIPTIONS.items():
        if (ultravox_home() / "data" / name / "dataset.json").is_file():
            info = read_dataset(name)
            splits = ", ".join(f"{split} {part['num_clips']} clips" for split, part in info["splits"].items())
            rows.append((name, splits, str(info["licence"]), description))
        else:
            rows.append((name, "not fetched", "", description))
    print_table(("name", "splits", "licence", "what it is"), rows)
    return 0
