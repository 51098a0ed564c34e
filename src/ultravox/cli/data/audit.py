"""``ultravox data audit``: whether each example comes as often as asked, in one order for any number of machines."""

import argparse
import json
import sys
from pathlib import Path

from ultravox.errors import UltravoxError

HELP = (
    "Of a config: drive its plan and loader through some epochs, with several numbers of ranks and worker processes, "
    "without training. Of a run folder that was trained with --logging.samples true: what it really trained on, over "
    "all restarts. Exit code 2 when a check fails."
)
TAKES_OVERRIDES = True
FORMAT_VERSION = 1
EXIT_FAILED = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to audit, and how."""
    parser.usage = "ultravox data audit CONFIG_OR_RUN [--epochs N] [--world-sizes N …] [--workers N …] [--KEY VALUE …]"
    parser.add_argument("what", metavar="CONFIG_OR_RUN", type=Path, help="YAML file of a run, or a run folder")
    parser.add_argument("--epochs", metavar="N", type=int, default=2, help="epochs of a dry run (default: 2)")
    parser.add_argument(
        "--world-sizes", metavar="N", type=int, nargs="+", default=[1, 2, 4], help="ranks (default: 1 2 4)"
    )
    parser.add_argument(
        "--workers", metavar="N", type=int, nargs="+", default=[0, 2], help="loader processes (default: 0 2)"
    )
    parser.add_argument("--load", action="store_true", help="also make each batch, as training does")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    """Audit, print, and say by the exit code whether all is well."""
    if args.epochs < 1 or min(args.world_sizes) < 1 or min(args.workers) < 0:
        raise UltravoxError("--epochs and --world-sizes take numbers from 1, --workers numbers from 0")
    return _post_hoc(args) if args.what.is_dir() else _dry(args)


def _post_hoc(args: argparse.Namespace) -> int:
    from ultravox.config.load import load_config

    path = args.what / "config.yaml"
    if not path.is_file():
        raise UltravoxError(f"{args.what} is no run folder: it has no config.yaml")
    if args.overrides:
        raise UltravoxError(f"a run is audited by its own config: leave out {args.overrides[0]}")
    config = load_config(path)

    from rich.console import Console

    from ultravox.training.audit import audit_run

    reports = audit_run(args.what, config)
    if args.json:
        stages = {name: report.to_json() for name, report in reports.items()}
        print(json.dumps({"version": FORMAT_VERSION, "stages": stages}))
    else:
        for name, report in reports.items():
            again = f"{report.num_superseded} places in steps trained again"
            Console().print(f"stage {name}: {report.num_ranks} rank(s), begun {report.num_attempts} time(s), {again}")
            Console().print(report)
            print(f"stage {name}: {report.verdict()}")
    return _verdict([name for name, report in reports.items() if not report.ok])


def _dry(args: argparse.Namespace) -> int:
    from ultravox.config.load import load_config

    config = load_config(args.what, args.overrides)

    from rich.console import Console

    from ultravox.data.audit import checks_table
    from ultravox.training.audit import dry_run, stage_tasks

    found, failed = {}, []
    for name, task in stage_tasks(config):
        dry = dry_run(task, epochs=args.epochs, world_sizes=args.world_sizes, workers=args.workers, load=args.load)
        found[name] = dry.to_json()
        if not dry.ok:
            failed.append(name)
        if not args.json:
            for setting, report in dry.settings.items():
                if not report.ok:
                    Console().print(f"stage {name}, ranks × workers {setting}")
                    Console().print(report)
            shown, first = next(iter(dry.settings.items()))
            title = f"stage {name}, ranks × workers {shown}: epochs {first.epochs[0]} to {first.epochs[-1]}"
            Console().print(checks_table([*first.checks, dry.same_order], title))
            for setting, report in dry.settings.items():
                print(f"stage {name}, ranks × workers {setting}: {report.verdict([dry.same_order])}")
    if args.json:
        print(json.dumps({"version": FORMAT_VERSION, "stages": found}))
    return _verdict(failed)


def _verdict(failed: list[str]) -> int:
    if failed:
        print(f"ultravox: error: the audit failed in stage {', '.join(failed)}", file=sys.stderr)
    return EXIT_FAILED if failed else 0
