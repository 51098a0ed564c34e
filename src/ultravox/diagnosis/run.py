"""One diagnosis: a workbench, the checks that were asked for, each with its time, and what they say together."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ultravox.config.schema import RunConfig
from ultravox.diagnosis.finding import Check, Diagnosis, Finding, Result, failed, skipped
from ultravox.diagnosis.registry import CHECKS
from ultravox.diagnosis.workbench import Workbench, build_workbench, describe_error
from ultravox.errors import ConfigError


def diagnose(
    config: RunConfig,
    name: str,
    *,
    numbers: Sequence[int] | None = None,
    checkpoint: Path | None = None,
    on_progress: Callable[[str], None] = lambda text: None,
    on_result: Callable[[Result], None] = lambda result: None,
) -> Diagnosis:
    """Ask the checks of a configuration. Nothing is written but features into the cache.

    Args:
        config: of the run, which need not have been trained.
        name: of the configuration, for people.
        numbers: of the checks; None = all.
        checkpoint: folder of a run of this configuration whose weights are looked at; None = fresh ones.
        on_progress: told what is being done.
        on_result: told of each result.

    Raises:
        UltravoxError: whatever in the configuration, the data or the checkpoint does not fit.
    """
    chosen = choose(numbers)
    begin = time.monotonic()
    bench = build_workbench(config, checkpoint, on_progress)
    results = []
    for check in chosen:
        on_progress(f"check {check.number}: {check.name}")
        results.append(ask(check, bench))
        on_result(results[-1])
    where = None if checkpoint is None else str(checkpoint)
    return Diagnosis(name, bench.stage.name, where, results, time.monotonic() - begin)


def choose(numbers: Sequence[int] | None) -> list[Check]:
    """The checks of some numbers. ConfigError for one that there is not."""
    known = {check.number: check for check in CHECKS}
    if unknown := [number for number in numbers or () if number not in known]:
        raise ConfigError(f"there is no check {unknown[0]}: choose from {', '.join(map(str, known))}")
    return [check for check in CHECKS if numbers is None or check.number in numbers]


def ask(check: Check, bench: Workbench) -> Result:
    """One check. An error inside it is what it found: the pipeline that it drives has broken."""
    begin = time.monotonic()
    try:
        reason = check.needs(bench)
        finding: Finding = skipped(reason) if reason else check.run(bench)
    except Exception as error:
        finding = failed(
            f"it could not be carried through: {describe_error(error)}",
            "an error in the code or the data that the check went through",
            "ULTRAVOX_TRACEBACK=1 shows where",
        )
        if _wants_traceback():
            raise
    return Result(check, finding, time.monotonic() - begin)


def _wants_traceback() -> bool:
    import os

    return bool(os.environ.get("ULTRAVOX_TRACEBACK"))
