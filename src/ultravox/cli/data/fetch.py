"""``ultravox data fetch``: fetch or make bundled datasets, once."""

import argparse

from ultravox.cli.datasets import DEFAULT_CHAT_TEMPLATE, DEFAULT_LANGUAGE_MODEL

HELP = "Fetch or make datasets, once."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Names, and how they are made."""
    parser.add_argument("names", metavar="NAME", nargs="+", help="bundled names; `ultravox data list` shows them")
    parser.add_argument(
        "--minutes", metavar="N", type=float, help="speech in synthetic-en, about (default: the quickstart's)"
    )
    parser.add_argument(
        "--language-model",
        metavar="MODEL",
        default=DEFAULT_LANGUAGE_MODEL,
        help="who answers the requests of spoken-requests-en (default: %(default)s)",
    )
    parser.add_argument(
        "--chat-template",
        metavar="NAME_OR_FILE",
        default=DEFAULT_CHAT_TEMPLATE,
        help="the chat template of the run that will train on the answers (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Fetch one after the other, and print their folders."""
    from ultravox.cli.datasets import fetch_dataset
    from ultravox.cli.names import check_names
    from ultravox.data.bundled import DESCRIPTIONS
    from ultravox.errors import UltravoxError

    if args.minutes is not None and not 0 < args.minutes <= 10_000:
        raise UltravoxError(f"--minutes takes a number above 0 and up to 10000, got {args.minutes:g}")
    check_names("dataset", args.names, DESCRIPTIONS)
    for name in args.names:
        print(f"{name}: {fetch_dataset(name, args.minutes, args.language_model, args.chat_template)}")
    return 0
