"""``ultravox data inspect``: what a dataset holds, and which rows to look at."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ultravox.cli.names import hours, parse_columns
from ultravox.errors import DataError
from ultravox.files import require_place

if TYPE_CHECKING:
    from ultravox.data.clip import Clip, RowFault
    from ultravox.evaluation.inspection import Inspection

HELP = (
    "Hours, languages, lengths, words, licences; rows whose audio or text is doubtful; audio and texts that stand in "
    "two splits."
)
MOST_ROWS = 10
EXIT_FAULTS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sources, and what to make of them."""
    parser.add_argument(
        "sources",
        metavar="NAME_OR_PATH",
        nargs="+",
        help="bundled name, a folder (dataset, audio, prepared, Parquet, Lhotse …), .jsonl files, or a hub's id",
    )
    parser.add_argument("--split", metavar="NAME", action="append", help="this split only; may be repeated")
    parser.add_argument("--subset", metavar="NAME", help="configuration of a Hugging Face dataset")
    parser.add_argument("--format", metavar="KIND", default="auto", help="kind of source (default: by what is there)")
    parser.add_argument(
        "--columns",
        metavar="[SOURCE:]OURS=THEIRS",
        action="append",
        default=[],
        help="name of a column, of every source or of one; may be repeated",
    )
    parser.add_argument(
        "--tokenizer", metavar="MODEL", help="also look for texts that hold special tokens of this model's tokenizer"
    )
    parser.add_argument("--max-clips", metavar="N", type=int, help="the first so many rows of each split")
    parser.add_argument("--html", metavar="FILE", type=Path, help="also write a page with histograms and players")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--no-decode", action="store_true", help="believe the rows' durations; hear no file")
    parser.add_argument(
        "--strict", action="store_true", help="exit with code 2 when a row cannot be used or stands in two splits"
    )


def run(args: argparse.Namespace) -> int:
    """Inspect the splits of some sources together."""
    from ultravox.evaluation.inspection import inspect_splits

    if args.html is not None:  # before the minutes of decoding
        require_place(args.html.parent)
        if args.html.is_dir():
            raise DataError(f"--html {args.html} is a folder: name the file to write")
    special = None
    if args.tokenizer is not None:
        from ultravox.cli.datasets import DEFAULT_CHAT_TEMPLATE
        from ultravox.data.examples import special_tokens
        from ultravox.model.factory import load_tokenizer

        special = special_tokens(load_tokenizer(args.tokenizer, DEFAULT_CHAT_TEMPLATE))
    splits, faults = _load(args)
    inspection = inspect_splits(
        splits, faults=faults, decode=not args.no_decode, special=special, on_progress=_progress()
    )
    if args.html is not None:
        from ultravox.evaluation.dataset_page import write_dataset_page

        write_dataset_page(args.html, ", ".join(args.sources), splits, inspection)
    if args.json:
        print(json.dumps(inspection.to_json(), ensure_ascii=False))
    else:
        _print(inspection)
        if args.html is not None:
            print(f"page  {args.html}")
    if args.strict and (found := inspection.faults):
        print(
            f"ultravox: error: faults: {len(found)}, the first in row {found[0].id} of {found[0].split}",
            file=sys.stderr,
        )
        return EXIT_FAULTS
    return 0


def _load(args: argparse.Namespace) -> "tuple[dict[str, list[Clip]], dict[str, list[RowFault]]]":
    """Name of each split → its clips, and its rows that give none. Two sources may not give one name to two splits."""
    from ultravox.data.source import SourceSpec
    from ultravox.data.sources import open_source, read_all

    columns = parse_columns(args.columns, args.sources)
    if args.max_clips is not None and args.max_clips < 1:
        raise DataError(f"--max-clips takes a number of at least 1, got {args.max_clips}")
    splits: dict[str, list[Clip]] = {}
    faults: dict[str, list[RowFault]] = {}
    for source in args.sources:
        spec = SourceSpec(source, args.format, subset=args.subset, columns=columns[source], needs_audio=False)
        for split in args.split or open_source(spec).splits():
            if split in splits:
                raise DataError(f"{source}: another source has a split {split!r} too; inspect them one by one")
            opened = open_source(replace(spec, split=split))
            splits[split], faults[split] = read_all(opened, args.max_clips)
    return splits, faults


def _progress():
    """A progress bar on standard error where that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    bar = Progress(console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task("inspecting", total=None)

    def update(done: int, total: int) -> None:
        if done == 1:
            bar.start()
        bar.update(task, completed=done, total=total)
        if done == total:
            bar.stop()

    return update


def _print(inspection: "Inspection") -> None:
    from rich.console import Console
    from rich.table import Table

    from ultravox.evaluation.inspection import MEANINGS, QUANTILES, worst_rows

    console = Console(highlight=False)
    table = Table(title=None, title_justify="left")
    for column in ("split", "clips", "audio", "words", "different", "texts", "speakers", "licences"):
        table.add_column(column, justify="left" if column in ("split", "licences") else "right")
    for split in inspection.splits:
        numbers = (split.num_words, split.vocabulary, split.num_texts, split.num_speakers)
        licences = ", ".join(split.licences)
        table.add_row(split.name, str(split.num_clips), hours(split.seconds), *map(str, numbers), licences)
    console.print(table)
    table = Table()
    for column in ("", "split", *QUANTILES):
        table.add_column(column, justify="right" if column in QUANTILES else "left")
    for split in inspection.splits:
        for title, values in (("seconds", split.duration), ("characters a second", split.characters_per_second)):
            table.add_row(title, split.name, *(f"{value:.1f}" for value in values.values()))
    console.print(table)
    for split in inspection.splits:
        lengths = ", ".join(f"{language} {hours(seconds)}" for language, seconds in split.languages.items())
        console.print(f"languages of {split.name}: {lengths}", markup=False, soft_wrap=True)
    for kind, count in inspection.counts().items():
        console.print(f"{count} × {kind}: {MEANINGS[kind]}", markup=False, soft_wrap=True)
    if not inspection.findings:
        console.print("no row to look at" + ("" if inspection.decoded else " (no file was decoded)"))
    for finding in worst_rows(inspection, MOST_ROWS):
        console.print(
            f"  {finding.kind}  {finding.split}  {finding.id}  {finding.detail}", markup=False, soft_wrap=True
        )
