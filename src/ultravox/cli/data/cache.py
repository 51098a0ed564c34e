"""``ultravox data cache``: compute the features of a run beforehand, look at what is cached, remove some."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ultravox.cli.names import hours
from ultravox.errors import DataError, UltravoxError

if TYPE_CHECKING:
    from ultravox.data.cache_folder import KeyInfo

HELP = (
    "The cached features of frozen encoders. `build CONFIG` computes what a run of this config needs, with the same "
    "overrides as `ultravox train`; `info` shows what is there; `clear` removes what no running process uses."
)
TAKES_OVERRIDES = True
VERSION = 1
EXIT_DAMAGED = 2

#: Which options belong to which action.
OPTIONS = {"build": (), "info": ("json", "verify"), "clear": ("older_than_days", "key", "all")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The action, a config for `build`, and what to show or to clear."""
    parser.usage = (
        "ultravox data cache build CONFIG [--KEY VALUE …]\n"
        "       ultravox data cache info [--json] [--verify]\n"
        "       ultravox data cache clear [--older-than-days N] [--key PREFIX] [--all]"
    )
    parser.add_argument("action", metavar="ACTION", choices=tuple(OPTIONS), help="build, info or clear")
    parser.add_argument("config", metavar="CONFIG", nargs="?", type=Path, help="build: YAML file of the run")
    parser.add_argument("--json", action="store_true", help="info: print one JSON object")
    parser.add_argument("--verify", action="store_true", help="info: read everything and check it; code 2 on damage")
    parser.add_argument("--older-than-days", metavar="N", type=float, help="clear: what no run has used for N days")
    parser.add_argument("--key", metavar="PREFIX", help="clear: keys that begin so, as `info` shows them")
    parser.add_argument("--all", action="store_true", help="clear: everything")


def run(args: argparse.Namespace) -> int:
    """One of the three."""
    for action, names in OPTIONS.items():
        for name in names if action != args.action else ():
            if getattr(args, name) not in (None, False):
                raise UltravoxError(f"--{name.replace('_', '-')} belongs to `data cache {action}`, not {args.action}")
    if args.action != "build" and (args.config is not None or args.overrides):
        word = args.config or args.overrides[0]
        raise UltravoxError(f"`data cache {args.action}` takes no config and no keys of one, got {word}")
    return {"build": _build, "info": _info, "clear": _clear}[args.action](args)


def _build(args: argparse.Namespace) -> int:
    if args.config is None:
        raise UltravoxError("`data cache build` needs a config: ultravox data cache build CONFIG")
    from ultravox.config.load import load_config

    config = load_config(args.config, args.overrides)
    if config.data.cache == "none":
        raise UltravoxError("a run of this config caches nothing (data.cache: none): there is nothing to build")

    if config.data.streaming:
        raise UltravoxError("a run of this config caches nothing (its source is streamed): there is nothing to build")

    from ultravox.model.factory import build_model, build_processor
    from ultravox.training.speech import prepare_speech

    data = prepare_speech(config, build_model(config.model), build_processor(config.model))
    if not data.cached:
        raise UltravoxError("every stage of this config augments waveforms, so that a run caches nothing")
    report, lengths = data.cache_report, data.examples.lengths
    others = [version.seconds for example in data.progress_examples for version in example.versions]
    seconds = float(lengths.seconds.sum()) + sum(others)
    left_out = ", ".join(f"{count} {reason}" for reason, count in data.quarantine.counts().items())
    print(
        f"{len(lengths) + len(data.progress_examples)} clips, "
        f"{int(lengths.exists.sum()) + len(others)} versions with their speeds, "
        f"{hours(seconds)}, {_size(report.num_bytes)}{f'; left out: {left_out}' if left_out else ''}\n"
        f"{report.num_encoded} encoded in {report.num_encoder_calls} encoder calls, {report.seconds:.1f} s "
        f"({report.wait_seconds:.1f} s of it waiting for decoded audio)\n{data.features.cache.folder}"
    )
    return 0


def _info(args: argparse.Namespace) -> int:
    from ultravox.data.cache_folder import describe, features_bytes, features_folder, key_folders
    from ultravox.data.cache_shards import find_shards

    folders = key_folders()
    with _bar(sum(len(find_shards(folder)) for folder in folders), args.verify) as on_shard:
        infos = [describe(folder, args.verify, on_shard) for folder in folders]
    if args.json:
        keys = [{**asdict(info), "health": info.health} for info in infos]
        print(
            json.dumps(
                {"version": VERSION, "folder": str(features_folder()), "num_bytes": features_bytes(), "keys": keys},
                ensure_ascii=False,
            )
        )
    else:
        _print(infos)
        none = "" if infos else "no cached features: "
        print(f"{none}{len(infos)} keys, {_size(features_bytes())} ({features_bytes()} bytes) in {features_folder()}")
    damaged = sum(info.num_damaged_entries or 0 for info in infos)
    if damaged:
        message = f"{damaged} entries are damaged; the next run that needs them makes them again"
        print(f"ultravox: error: {message}", file=sys.stderr)
    return EXIT_DAMAGED if damaged else 0


def _clear(args: argparse.Namespace) -> int:
    from ultravox.data.cache_folder import clear, features_bytes, features_folder

    if args.all and (args.key is not None or args.older_than_days is not None):
        raise UltravoxError("--all clears everything: leave out --key and --older-than-days")
    if not (args.all or args.key or args.older_than_days is not None):
        raise UltravoxError("say what to clear: --all, --key PREFIX, --older-than-days N, or the last two together")
    if args.older_than_days is not None and not args.older_than_days >= 0:
        raise UltravoxError(f"--older-than-days takes a number from 0, got {args.older_than_days:g}")
    cleared = clear(args.key or "", args.older_than_days or 0.0)
    counts = {"key": cleared.num_keys, "shard of other keys": cleared.num_shards}
    counts["table of audio files' hashes"] = cleared.num_hash_tables
    what = [f"{count} {name if count == 1 else _plural(name)}" for name, count in counts.items() if count]
    freed = f"{_size(cleared.num_bytes)} ({cleared.num_bytes} bytes)"
    removed = f"removed {', '.join(what)}: {freed}" if what or cleared.num_bytes else "nothing to remove"
    print(f"{removed} in {features_folder()}; {_size(features_bytes())} are left there")
    if cleared.in_use:
        print(f"kept, since running processes use them: {', '.join(cleared.in_use)}")
    if cleared.in_use and not (cleared.num_keys or cleared.num_shards):
        raise DataError("nothing was cleared: running processes use it; try again when they have ended")
    return 0


def _print(infos: "list[KeyInfo]") -> None:
    from ultravox.cli.names import print_table

    rows = []
    for info in infos:
        kind = f"{info.preprocessing}, {info.num_channels} × {info.dtype}"
        age = "in use" if info.in_use else time.strftime("%Y-%m-%d %H:%M", time.localtime(info.last_use))
        version = "unknown" if info.version is None else str(info.version)
        length = hours(info.audio_seconds) if info.audio_seconds else "–"  # older indexes do not tell
        size = _size(info.num_bytes)
        rows.append((info.id[:12], version, info.encoder, kind, f"{info.num_entries}", length, size, age, info.health))
    titles = ("key", "format", "encoder", "what", "entries", "audio", "size", "last use", "health")
    if rows:
        print_table(titles, rows)


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[], None]]:
    """While shards are checked, a bar on standard error where that is a terminal; yields what to call for each."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (shown and console.is_terminal)) as progress:
        task = progress.add_task("checking", total=total)
        yield lambda: progress.advance(task)


def _plural(name: str) -> str:
    first, _, rest = name.partition(" ")
    return f"{first}s {rest}".rstrip()


def _size(num_bytes: int) -> str:
    """In decimal units, as data.max_cache_gb."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"
