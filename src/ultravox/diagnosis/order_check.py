"""Check 15: the audit of the data's order, as `ultravox data audit CONFIG` makes it, of every stage."""

from ultravox.diagnosis.finding import Blame, Check, Finding, failed, passed
from ultravox.diagnosis.workbench import Workbench
from ultravox.training.audit import dry_run
from ultravox.training.stage import TASKS

EPOCHS = 2
WORLD_SIZES, WORKERS = (1, 2, 4), (0, 2)


def check_order(bench: Workbench) -> Finding:
    """A dry run of each stage's plan and loader."""
    faults, records, judged = [], 0, 0
    for stage in bench.config.stages:
        task = TASKS[stage.objective](bench.model, bench.processor, bench.data, stage, bench.config.seed)
        dry = dry_run(task, epochs=EPOCHS, world_sizes=WORLD_SIZES, workers=WORKERS)
        for setting, report in dry.settings.items():
            records += report.num_records
            judged += sum(check.passed is not None for check in report.checks)
            faults += [(stage.name, setting, check) for check in report.checks if check.passed is False]
        if dry.same_order.passed is False:
            faults.append((stage.name, "all", dry.same_order))
    bench.reset()
    settings = f"{len(WORLD_SIZES)} × {len(WORKERS)} numbers of ranks and workers, {EPOCHS} epochs"
    if faults:
        name, setting, check = faults[0]
        return failed(
            f"stage {name}, ranks × workers {setting}: {check.name}: expected {check.expected}, found {check.found}"
            + (f" (first: {', '.join(check.examples[:3])})" if check.examples else ""),
            "examples that never come, come too often, go to two ranks, or come in one order in every epoch",
            "ultravox data audit CONFIG shows every check; look at the loader's ranks and epochs",
            [f"{name}, {setting}: {check.name}: {check.found}" for name, setting, check in faults],
            faults=sorted({check.name for _, _, check in faults}),
        )
    names = ", ".join(stage.name for stage in bench.config.stages)
    return passed(
        f"{names}: every example as often as asked, on one rank, in one order ({settings}; {records} places in steps)",
        records=records,
        judged=judged,
    )


CHECKS = [
    Check(
        15,
        "data audit",
        "coverage, repeats, ranks, mixture; one order for every number of ranks and workers, another in each epoch",
        Blame.ORDER,
        check_order,
        lambda bench: (
            ""
            if bench.data.stream is None
            else "a stream's examples are not known beforehand: train with --logging.samples true and audit the run"
        ),
    )
]
