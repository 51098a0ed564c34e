"""``ultravox data``: the datasets that UltraVox knows by name, and what any dataset holds."""

import argparse
from pathlib import Path

from ultravox.cli.datasets import DEFAULT_CHAT_TEMPLATE, DEFAULT_LANGUAGE_MODEL

HELP = "List the bundled datasets, fetch some, or look into any dataset."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Three actions: list, fetch and inspect."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    actions.add_parser("list", help="show the bundled names", description="Show the bundled names.")
    fetch = actions.add_parser("fetch", help="fetch datasets", description="Fetch or make datasets, once.")
    fetch.add_argument("names", metavar="NAME", nargs="+", help="bundled names; `ultravox data list` shows them")
    fetch.add_argument(
        "--minutes", metavar="N", type=float, help="speech in synthetic-en, about (default: the quickstart's)"
    )
    fetch.add_argument(
        "--language-model",
        metavar="MODEL",
        default=DEFAULT_LANGUAGE_MODEL,
        help="who answers the requests of spoken-requests-en (default: %(default)s)",
    )
    fetch.add_argument(
        "--chat-template",
        metavar="NAME_OR_FILE",
        default=DEFAULT_CHAT_TEMPLATE,
        help="the chat template of the run that will train on the answers (default: %(default)s)",
    )
    inspect = actions.add_parser(
        "inspect",
        help="what a dataset holds, and which rows to look at",
        description="Hours, lengths, words, licences; rows whose audio or text is doubtful; audio and texts that stand "
        "in two splits.",
    )
    inspect.add_argument(
        "sources",
        metavar="NAME_OR_PATH",
        nargs="+",
        help="bundled name, dataset or audio folder (all its splits), or .jsonl files",
    )
    inspect.add_argument("--html", metavar="FILE", type=Path, help="also write a page with histograms and players")
    inspect.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    inspect.add_argument("--no-decode", action="store_true", help="believe the rows' durations; hear no file")
    inspect.add_argument(
        "--strict", action="store_true", help="exit with code 2 when a row cannot be used or stands in two splits"
    )


def run(args: argparse.Namespace) -> int:
    """List, fetch or inspect."""
    if args.action == "inspect":
        from ultravox.cli.inspect_dataset import inspect_dataset

        return inspect_dataset(args.sources, args.html, args.json, not args.no_decode, args.strict)

    from ultravox.cli.datasets import fetch_dataset
    from ultravox.cli.names import check_names, print_table
    from ultravox.data.bundled import DESCRIPTIONS
    from ultravox.data.manifest import read_dataset
    from ultravox.errors import UltravoxError
    from ultravox.files import ultravox_home

    if args.action == "fetch":
        if args.minutes is not None and not 0 < args.minutes <= 10_000:
            raise UltravoxError(f"--minutes takes a number above 0 and up to 10000, got {args.minutes:g}")
        check_names("dataset", args.names, DESCRIPTIONS)
        for name in args.names:
            print(f"{name}: {fetch_dataset(name, args.minutes, args.language_model, args.chat_template)}")
        return 0

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
