"""``ultravox data``: the datasets that UltraVox knows by name."""

import argparse

HELP = "List the bundled datasets, or fetch some."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Two actions: list and fetch."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    actions.add_parser("list", help="show the bundled names", description="Show the bundled names.")
    fetch = actions.add_parser("fetch", help="fetch datasets", description="Fetch or make datasets, once.")
    fetch.add_argument("names", metavar="NAME", nargs="+", help="bundled names; `ultravox data list` shows them")
    fetch.add_argument("--force", action="store_true", help="fetch again, even where the dataset is already there")


def run(args: argparse.Namespace) -> int:
    """List or fetch."""
    from ultravox.cli.names import check_names, print_table
    from ultravox.data.manifest import BUNDLED_DATASETS, read_dataset
    from ultravox.files import ultravox_home

    if args.action == "fetch":
        from ultravox.cli.datasets import fetch_dataset

        check_names("dataset", args.names, BUNDLED_DATASETS)
        for name in args.names:
            print(f"{name}: {fetch_dataset(name, force=args.force)}")
        return 0

    rows = []
    for name in BUNDLED_DATASETS:
        if (ultravox_home() / "data" / name / "dataset.json").is_file():
            info = read_dataset(name)
            splits = ", ".join(f"{split} {part['num_clips']} clips" for split, part in info["splits"].items())
            rows.append((name, splits, str(info["licence"])))
        else:
            rows.append((name, "not fetched", ""))
    print_table(("name", "splits", "licence"), rows)
    return 0
