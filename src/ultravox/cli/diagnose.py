"""``ultravox diagnose``: the loss is not going down; is it a real issue?"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ultravox.errors import ConfigError
from ultravox.files import require_place

if TYPE_CHECKING:
    from rich.console import Console

    from ultravox.diagnosis.finding import Diagnosis, Result

HELP = (
    "Check a run before, or without, training it: eighteen checks of its data, labels, model and optimizer, built from "
    "the config as `ultravox train` builds them, and one verdict. Nothing is written into the run's folder. Exit code "
    "1 when a check fails."
)
TAKES_OVERRIDES = True
EXIT_FAILED = 1
COLOURS = {"PASS": "green", "WARN": "yellow", "FAIL": "red", "SKIP": "dim"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The config file and what to check; every other --key is a key of the config."""
    parser.usage = (
        "ultravox diagnose CONFIG [--checks N,N …] [--checkpoint RUN] [--json FILE] [--html FILE] [--KEY VALUE …]"
    )
    parser.add_argument(
        "config", metavar="CONFIG", type=Path, help="YAML file of the run, such as configs/quickstart.yaml"
    )
    parser.add_argument(
        "--checks", metavar="N,N …", type=_numbers, help="numbers of the checks (default: all; docs/diagnose.md)"
    )
    parser.add_argument(
        "--checkpoint",
        metavar="RUN",
        type=Path,
        help="folder of a run of this config: look at its trained weights and its log (default: fresh weights)",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write all numbers as one JSON object")
    parser.add_argument("--html", metavar="FILE", type=Path, help="also write a page to look at or to send")


def _numbers(text: str) -> list[int]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"expected numbers such as 1,2,5, got {text!r}")
    return [int(number) for number in text.split(",")]


def run(args: argparse.Namespace) -> int:
    """Diagnose, print each result as it comes, then the verdict."""
    for option in ("json", "html"):  # before the minutes of work
        path = getattr(args, option)
        if path is not None:
            require_place(path.parent)
            if path.is_dir():
                raise ConfigError(f"--{option} {path} is a folder: name the file to write")

    from ultravox.config.load import load_config

    config = load_config(args.config, args.overrides)

    from rich.console import Console

    from ultravox.diagnosis.run import choose, diagnose

    choose(args.checks)
    console, errors = Console(highlight=False), Console(stderr=True, highlight=False)
    with errors.status("beginning") as status:

        def told(text: str) -> None:
            status.update(text)
            if not errors.is_terminal:
                errors.print(text, markup=False, soft_wrap=True)

        found = diagnose(
            config,
            str(args.config),
            numbers=args.checks,
            checkpoint=args.checkpoint,
            on_progress=told,
            on_result=lambda result: print_result(result, console),
        )
    _write(args, found)
    print_verdict(found, console)
    for name, path in (("json", args.json), ("page", args.html)):
        if path is not None:
            console.print(f"{name}  {path}", markup=False, soft_wrap=True)
    if not found.healthy:
        names = ", ".join(str(result.check.number) for result in found.failed)
        print(f"ultravox: error: failed: check {names}", file=sys.stderr)
        return EXIT_FAILED
    return 0


def _write(args: argparse.Namespace, found: "Diagnosis") -> None:
    from ultravox.files import atomic_write

    if args.json is not None:
        atomic_write(args.json, json.dumps(found.to_json(), indent=2, ensure_ascii=False) + "\n")
    if args.html is not None:
        from ultravox.diagnosis.page import write_page

        write_page(args.html, found)


def print_result(result: "Result", console: "Console") -> None:
    """One check: its outcome, what was measured, and what to do about it."""
    from rich.markup import escape

    finding = result.finding
    mark = f"[{COLOURS[finding.status]}]{finding.status}[/]"
    title = f"{mark} [bold]{result.check.number:2d} {result.check.name}[/]  [dim]{result.seconds:.1f} s[/]"
    console.print(title, soft_wrap=True)
    console.print(f"     {escape(finding.evidence)}", soft_wrap=True)
    shows_lines = finding.status in ("WARN", "FAIL") or result.check.number == 1
    for line in finding.lines if shows_lines else ():
        console.print(f"       {escape(line)}", soft_wrap=True)
    for label, text in (("probable cause", finding.cause), ("next", finding.action)):
        if text:
            console.print(f"     [bold]{label}:[/] {escape(text)}", soft_wrap=True)


def print_verdict(found: "Diagnosis", console: "Console") -> None:
    """How many checks came out how, and what they say together."""
    from rich.markup import escape

    counts = ", ".join(f"{count} {status}" for status, count in found.counts.items() if count)
    console.print(f"{counts}; {found.seconds:.0f} s, stage {found.stage}", markup=False, soft_wrap=True)
    colour = "green" if found.healthy else "red"
    console.print(f"[bold {colour}]{escape(found.verdict)}[/]", soft_wrap=True)


def epilog() -> str:
    """The checks, each with its criterion."""
    import textwrap

    from ultravox.diagnosis.registry import CHECKS

    lines = ["checks:"]
    for check in CHECKS:
        lines.append(f"  {check.number:2d}  {check.name}")
        lines.extend(textwrap.wrap(check.criterion, 100, initial_indent="      ", subsequent_indent="      "))
    return "\n".join(lines)
