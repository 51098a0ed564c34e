"""The audit of the data's order, for a run that has been and for one that is to be.

A dry run drives the real plan and the real loader, with as many ranks and worker processes as are asked for, and trains
nothing. Its records, as those that a run leaves, are held against the examples that its configuration means.
"""

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultravox.config.schema import RunConfig
from ultravox.data.audit import AuditReport, Check, Expected, audit_records, compare_orders
from ultravox.data.loader import Loader, killed_workers_explained
from ultravox.data.order import DataOrder, PlannedBatch, Position
from ultravox.data.sample_log import SampleLog, parse_uids, read_sample_logs
from ultravox.data.stream_audit import ExpectedStreams, audit_streams
from ultravox.data.stream_order import StreamOrder
from ultravox.errors import DataError
from ultravox.model.factory import build_model, build_processor
from ultravox.training.examples import ExampleTable
from ultravox.training.rows import source_key
from ultravox.training.speech import prepare_speech
from ultravox.training.speech_task import SpeechTask
from ultravox.training.stage import TASKS
from ultravox.training.stream import prepare_stream
from ultravox.training.trackers.samples import samples_folder


@dataclass(slots=True)
class Names:
    """All that a dry run needs of a batch."""

    uids: list[str]
    sources: list[int]


class NameMaker:
    """Makes batches of names, in the place of tensors."""

    def __init__(self, examples: ExampleTable) -> None:
        self._uids, self._sources = [example.uid for example in examples], examples.sources.tolist()

    def __call__(self, planned: PlannedBatch, position: Position) -> Names:
        rows = planned.rows.tolist()
        return Names([self._uids[row] for row in rows], [self._sources[row] for row in rows])


def stage_tasks(config: RunConfig) -> Iterator[tuple[str, SpeechTask]]:
    """Each stage's name and task, made as a run makes them; features that are missing in the cache are computed."""
    model, processor = build_model(config.model), build_processor(config.model)
    prepare = prepare_stream if config.data.streaming else prepare_speech
    data = prepare(config, model, processor)
    for stage in config.stages:
        yield stage.name, TASKS[stage.objective](model, processor, data, stage, config.seed)


def expected_of(task: SpeechTask, num_epochs: int | None = None) -> Expected:
    """What the records of a task are held against."""
    assert isinstance(task.order, DataOrder), "a stream has no mixture"
    return Expected(parse_uids([example.uid for example in task.examples]), task.order.mixture, num_epochs)


def expected_of_streams(task: SpeechTask) -> ExpectedStreams:
    """The same of a task on streams. Each of them is read once, as a whole."""
    assert isinstance(task.order, StreamOrder)
    source = task.order.source
    uids = task.epoch_uids()
    return ExpectedStreams({name: parse_uids(mine) for name, mine in uids.items()}, source.shares, source.window)


def audit_run(run_dir: Path, config: RunConfig) -> dict[str, AuditReport]:
    """Stage → audit of what it trained on, over all its attempts and ranks.

    Raises:
        DataError: the run has no log of its samples.
    """
    reports = {}
    for name, task in stage_tasks(config):
        folder = samples_folder(run_dir, name)
        if folder.is_dir():
            found = read_sample_logs(folder)
            if task.data.stream is None:
                reports[name] = audit_records(found, expected_of(task))
            else:
                reports[name] = audit_streams(found, expected_of_streams(task))
    if not reports:
        raise DataError(f"{run_dir} has no log of its samples: train with --logging.samples true to audit a run")
    return reports


@dataclass(slots=True)
class DryRun:
    """One stage, driven with several numbers of ranks and workers."""

    settings: dict[str, AuditReport]
    same_order: Check

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return self.same_order.passed is not False and all(report.ok for report in self.settings.values())

    def to_json(self) -> dict[str, Any]:
        settings = {name: report.to_json() for name, report in self.settings.items()}
        same = {"passed": self.same_order.passed, "found": self.same_order.found, "odd": self.same_order.examples}
        return {"ok": self.ok, "settings": settings, "same_order": same}


def dry_run(
    task: SpeechTask, *, epochs: int, world_sizes: Sequence[int], workers: Sequence[int], load: bool = False
) -> DryRun:
    """Drive a task's plan and loader through some epochs, rank after rank.

    Args:
        task: of a stage.
        epochs: that are to be whole.
        world_sizes, workers: each of the one with each of the other.
        load: whether batches are made as training needs them, decoding and all; else of names alone.
    """
    if task.data.stream is not None:
        raise DataError(
            "the plan of a stream cannot be audited: nobody knows its examples beforehand; train with "
            "--logging.samples true and audit the run folder"
        )
    per_step = math.lcm(task.stage.accumulation_steps, *world_sizes)
    make = task.make_batch if load else NameMaker(task.examples)
    reports = {}
    for world_size in world_sizes:
        for count in workers:
            with tempfile.TemporaryDirectory() as folder:
                for rank in range(world_size):
                    loader = Loader(
                        task.order, make, batches_per_step=per_step, rank=rank, world_size=world_size, workers=count
                    )
                    _log_rank(Path(folder), loader, task, epochs, rank, world_size)
                report = audit_records(read_sample_logs(Path(folder)), expected_of(task))
            reports[f"{world_size} × {count}"] = report
    return DryRun(reports, compare_orders(reports))


def _log_rank(folder: Path, loader: Loader, task: SpeechTask, epochs: int, rank: int, world_size: int) -> None:
    """The samples of one rank, up to the first step that reaches beyond the last epoch: only so are they whole."""
    names = [source_key(source) for source in task.data.sources]
    log = SampleLog(folder, rank=rank, world_size=world_size, attempt=0, first_step=0)
    with log, killed_workers_explained():
        for step, loaded in enumerate(loader.steps(Position())):
            for item in loaded.batches:
                log.write(
                    step=step,
                    micro_batch=item.index,
                    worker=item.worker,
                    epoch=item.position.epoch,
                    uids=item.batch.uids,
                    sources=[names[source] for source in item.batch.sources],
                )
            if loaded.after > Position(epochs, 0, 0):
                return
