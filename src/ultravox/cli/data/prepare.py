"""``ultravox data prepare``: check a dataset and pack it into Parquet shards to train from."""

import argparse
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ultravox.cli.names import hours, parse_columns
from ultravox.errors import UltravoxError

if TYPE_CHECKING:
    from ultravox.data.clip import Clip, RowFault
    from ultravox.data.prepare import Prepared
    from ultravox.data.sharding import Rows

HELP = """\
Check every row of a dataset and pack it into Parquet shards: audio at 16 kHz inside, lengths counted, bad rows left
out, counted and named. A training names the folder as a source; Hugging Face datasets loads it too. The result is the
same, byte for byte, whatever the number of workers; after a crash, the same command goes on where it was."""
EXIT_FAULTS = 2
MAX_WORKERS = 1024


def epilog() -> str:
    """Examples."""
    return """\
examples:
  ultravox data prepare asterisk-en --output prepared/asterisk
  ultravox data prepare train.jsonl heldout.jsonl --output prepared/mine --tokenizer smollm2-135m-instruct
  ultravox data prepare ours.jsonl theirs.jsonl --columns theirs.jsonl:text=sentence --output prepared/both
  ultravox data prepare corpus/ --splits train --output prepared/corpus --shards-multiple-of 64 --workers 16
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sources, where to, which rows, how cut, who works."""
    parser.add_argument(
        "sources",
        metavar="SOURCE",
        nargs="+",
        help="bundled name, folder, .jsonl file, or a hub's id; splits of one name are joined, in this order",
    )
    parser.add_argument("--output", metavar="FOLDER", required=True, help="the folder to make")
    parser.add_argument("--splits", metavar="NAME", nargs="+", help="splits to prepare (default: all)")
    parser.add_argument("--subset", metavar="NAME", help="configuration of a Hugging Face dataset")
    parser.add_argument("--revision", metavar="NAME", help="commit, tag or branch of a dataset on the hub")
    parser.add_argument("--format", metavar="KIND", default="auto", help="kind of source (default: by what is there)")
    parser.add_argument(
        "--columns",
        metavar="[SOURCE:]OURS=THEIRS",
        action="append",
        default=[],
        help="name of a column, of every source or of one; may be repeated",
    )
    parser.add_argument("--tokenizer", metavar="MODEL", help="count each text's tokens by this model's tokenizer")
    rows = parser.add_argument_group("rows")
    rows.add_argument(
        "--min-seconds",
        metavar="S",
        type=float,
        default=0.1,
        help="leave shorter recordings out (default: %(default)s)",
    )
    rows.add_argument(
        "--max-seconds", metavar="S", type=float, default=600.0, help="leave longer audio out (default: %(default)s)"
    )
    rows.add_argument("--keep-silent", action="store_true", help="keep recordings without a sound; else left out")
    rows.add_argument(
        "--keep-original",
        action="store_true",
        help="store each file's own bytes, not FLAC at 16 kHz (FLAC that is 16 kHz, mono, 16 bits always stays)",
    )
    rows.add_argument(
        "--max-quarantine-share",
        metavar="X",
        type=float,
        default=0.01,
        help="stop when more than this share of the rows is faulty (default: %(default)s)",
    )
    rows.add_argument("--strict", action="store_true", help="exit with code 2 when two rows share an id or a recording")
    shards = parser.add_argument_group("shards")
    shards.add_argument(
        "--shards-multiple-of",
        metavar="N",
        type=int,
        default=8,
        help="shards of a split: a multiple of this; best, training processes x their workers (default: %(default)s)",
    )
    shards.add_argument(
        "--max-shard-mb", metavar="MB", type=int, default=512, help="most megabytes in a shard (default: %(default)s)"
    )
    work = parser.add_argument_group("work")
    work.add_argument("--workers", metavar="N", type=int, help="processes (default: one for each processor)")
    work.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="who works: processes here, or Ray (extra ray), here or on the cluster at RAY_ADDRESS (default: local)",
    )
    work.add_argument("--overwrite", action="store_true", help="make it anew, even if it is there")


def run(args: argparse.Namespace) -> int:
    """Prepare, and print what came out."""
    workers = _check(args)
    from ultravox.data.prepare import prepare_dataset
    from ultravox.data.quarantine import ID_TWICE
    from ultravox.data.shard import RowOptions
    from ultravox.data.sharding import PrepareOptions

    splits, sources = _open(args)
    rows = RowOptions(args.min_seconds, args.max_seconds, args.keep_original, args.keep_silent)
    with _progress() as on_progress:
        prepared = prepare_dataset(
            args.output,
            splits,
            PrepareOptions(rows, args.shards_multiple_of, args.max_shard_mb, args.tokenizer),
            sources=sources,
            count_tokens=args.tokenizer and _token_counter(args.tokenizer),
            engine=args.engine,
            workers=workers,
            max_quarantine_share=args.max_quarantine_share,
            overwrite=args.overwrite,
            on_progress=on_progress,
        )
    _print(prepared, args.output)
    repeated = prepared.info["same_audio"]["num_rows"] or prepared.info["quarantine"]["counts"].get(ID_TWICE)
    return EXIT_FAULTS if args.strict and repeated else 0


def _open(args: argparse.Namespace) -> "tuple[dict[str, Rows], list[dict[str, Any]]]":
    """Name of each split → its rows, of all sources; and what is known of each source. The one place that opens them.

    A split is called as in its source, with _ for what no split's name may hold.
    """
    from ultravox.data.source import SourceSpec
    from ultravox.data.sources import open_source

    columns = parse_columns(args.columns, args.sources)
    parts: dict[str, list[SourceSpec]] = {}
    sources: list[dict[str, Any]] = []
    there: list[str] = []
    for name in args.sources:
        spec = SourceSpec(
            name, args.format, subset=args.subset, revision=args.revision, columns=columns[name], needs_audio=False
        )
        source = open_source(spec)
        about = source.describe()
        keys = ("licence", "attribution")
        sources.append({"name": name, **{key: about.get(key) or getattr(source, key) for key in keys}})
        there += source.splits()
        for split in source.splits():
            if args.splits is None or split in args.splits:
                parts.setdefault(re.sub(r"[^\w.]", "_", split), []).append(replace(spec, split=split))
    if missing := [split for split in args.splits or () if split not in there]:
        raise UltravoxError(f"no source has a split {missing[0]!r}: there is {', '.join(sorted(set(there)))}")

    def rows(specs: list[SourceSpec]) -> "Iterator[Clip | RowFault]":
        return (row for spec in specs for _, row in open_source(spec).rows())

    return {split: partial(rows, specs) for split, specs in parts.items()}, sources


def _token_counter(model: str) -> Callable[[list[str]], list[int]]:
    """Texts → tokens of each, by a model's tokenizer, which is loaded at the first use."""
    tokenizer: Any = None

    def count(texts: list[str]) -> list[int]:
        nonlocal tokenizer
        if tokenizer is None:
            from ultravox.cli.datasets import DEFAULT_CHAT_TEMPLATE
            from ultravox.model.factory import load_tokenizer

            tokenizer = load_tokenizer(model, DEFAULT_CHAT_TEMPLATE)  # the template plays no part in counting
        return list(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))

    return count


def _check(args: argparse.Namespace) -> int:
    """Refuse numbers that make no sense; gives the number of workers."""
    if not 0 <= args.min_seconds < args.max_seconds <= 600:
        raise UltravoxError(
            "--min-seconds and --max-seconds must be 0 or more, in this order, and at most 600, got "
            f"{args.min_seconds:g} and {args.max_seconds:g}"
        )
    if not 0 <= args.max_quarantine_share <= 1:
        raise UltravoxError(f"--max-quarantine-share takes 0 to 1, got {args.max_quarantine_share:g}")
    workers = len(os.sched_getaffinity(0)) if args.workers is None else args.workers
    limits = {"workers": (workers, MAX_WORKERS), "shards-multiple-of": (args.shards_multiple_of, 10_000)}
    for option, (value, most) in {**limits, "max-shard-mb": (args.max_shard_mb, 100_000)}.items():
        if not 1 <= value <= most:
            raise UltravoxError(f"--{option} takes a whole number from 1 to {most}, got {value}")
    return workers


def _progress():
    """A progress bar on standard error where that is a terminal."""
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import Progress

    @contextmanager
    def bar():
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("preparing", total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)

    return bar()


def _print(prepared: "Prepared", output: str) -> None:
    from ultravox.cli.names import print_table

    info = prepared.info
    rows = []
    for name, split in info["splits"].items():
        megabytes = sum(shard["num_bytes"] for shard in split["shards"]) / 1e6
        length = hours(split["seconds"])
        rows.append((name, str(split["num_rows"]), length, str(len(split["shards"])), f"{megabytes:.1f}"))
    print_table(("split", "rows", "audio", "shards", "MB"), rows)
    for reason, count in info["quarantine"]["counts"].items():
        print(f"{count} × left out: {reason}")
    if info["quarantine"]["counts"]:
        print(f"each is named in {output}/{info['quarantine']['file']}")
    if count := info["same_audio"]["num_rows"]:
        print(f"{count} × the same recording as a row before: {output}/{info['same_audio']['file']}")
    print(f"prepared  {output}" + ("" if prepared.num_built else "  (it was there already)"))
