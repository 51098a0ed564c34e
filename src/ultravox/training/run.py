"""One training run, from a configuration to a folder: `run_training`."""

import hashlib
import json
import random
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from ultravox.auth.credentials import exported
from ultravox.config.load import dump_config
from ultravox.config.schema import RunConfig, StageConfig
from ultravox.data.loader import Loader, killed_workers_explained
from ultravox.data.order import Position
from ultravox.data.sample_log import SampleLog, next_attempt
from ultravox.data.sources import require_not_shrunk
from ultravox.errors import ConfigError, UltravoxError
from ultravox.files import atomic_folder, atomic_write
from ultravox.model.factory import build_model, build_processor, save_model
from ultravox.model.fast import use_fast_kernels
from ultravox.training import checkpoint as checkpoints
from ultravox.training.align import AlignTask
from ultravox.training.heads import save_head
from ultravox.training.identity import base_models, deciding_keys
from ultravox.training.interrupt import StopRequest, stop_on_signals
from ultravox.training.measure import MatmulRate, MatmulSamples, peak_memory_bytes
from ultravox.training.memory import keep_freed_memory, release_freed_memory
from ultravox.training.memory_model import MemoryModel
from ultravox.training.memory_probe import calibrate_task
from ultravox.training.optim import Optimizer
from ultravox.training.preflight import preflight, require_transcripts
from ultravox.training.progress import TerminalProgress
from ultravox.training.resume import (
    finished_text,
    is_finished,
    require_same,
    require_same_config,
    require_same_data,
)
from ultravox.training.rows import source_key, source_spec
from ultravox.training.run_folder import clear, lock, require_free
from ultravox.training.speech import SpeechData, prepare_speech
from ultravox.training.speech_task import SpeechTask
from ultravox.training.stream import prepare_stream
from ultravox.training.summary import RunState, announce, run_summary, stage_summary, tell, tell_mixture
from ultravox.training.trackers.jsonl import JsonLinesLog, drop_rows_after
from ultravox.training.trackers.registry import make_tracking
from ultravox.training.trackers.samples import StepSamples, samples_folder
from ultravox.training.trackers.tensorboard import TensorBoardLog, tensorboard_is_installed
from ultravox.training.trackers.tracking import RunTracking, StageTracking
from ultravox.training.trainer import LoopSettings, LoopState, run_stage
from ultravox.training.tune import TuneTask

TASKS: dict[str, type[SpeechTask]] = {"align": AlignTask, "tune": TuneTask}


def run_training(config: RunConfig, resume: bool = False, overwrite: bool = False) -> Path:
    """Train as the configuration says.

    Args:
        config: of the run.
        resume: go on from the last checkpoint, bit for bit as if the run had not stopped.
        overwrite: replace an earlier run in the folder, once the new one is ready to begin.

    Returns: the run folder, with `model/` in the public format and `train.json`.

    Raises:
        ConfigError: the folder holds a run, and neither `resume` nor `overwrite` is set; or no checkpoint to resume.
        TrainingInterrupted: on Ctrl-C or SIGTERM, after a checkpoint was saved.
        UltravoxError: whatever in the configuration, the data or a checkpoint does not fit.
    """
    begin = time.monotonic()
    run_dir = Path(config.run_dir)
    names = [stage.name for stage in config.stages]
    if resume and not checkpoints.list_checkpoints(run_dir, names):
        instead = "begin with --overwrite" if (run_dir / "config.yaml").is_file() else "leave out --resume to begin"
        raise ConfigError(f"{run_dir} holds no checkpoint of these stages to go on from: {instead}")
    with ExitStack() as stack:
        # 1. One process per run folder
        lock(run_dir, stack)
        found = checkpoints.list_checkpoints(run_dir, names)
        if not resume:
            require_free(run_dir, overwrite=overwrite)
        start = checkpoints.load_checkpoint(found[-1]) if resume else None
        if start is not None:
            require_same_config(start.state["config"], deciding_keys(config), found[-1])

        credentials = preflight(config)
        stack.enter_context(exported(credentials))
        require_transcripts(config)
        # 2. The model; its fresh weights are a function of the seed
        seed_everything(config.seed, "model")
        processor = build_processor(config.model)
        model = build_model(config.model)
        use_fast_kernels(model)
        bases = base_models(config)  # after loading: only then is a hub model's commit known
        if start is not None:
            require_same(start.state["base_models"], bases, "a base model", found[-1])

        # 3. The data: clips, tokens, features of the frozen encoder
        prepare = prepare_stream if config.data.streaming else prepare_speech
        data = prepare(config, model, processor)
        run = RunState(feature_cache_seconds=data.cache_report.seconds)
        if start is not None:
            for source in config.data.sources:
                key = source_key(source)
                require_not_shrunk(source_spec(source), start.state["sizes"].get(key, 0), data.sizes[key])
            require_same_data(start.state, data.fingerprints, data.sizes, found[-1])
            run = RunState(**start.state["run"])
            run.feature_cache_seconds += data.cache_report.seconds
        announce(model, data)

        # 4. The stages. Only now that all is ready does an earlier run go, unless it is gone on with
        if not resume:
            clear(run_dir)
        atomic_write(run_dir / "config.yaml", dump_config(config))
        drop_rows_after(run_dir / "log.jsonl", names, *((start.state["stage"], start.state["step"]) if start else ()))
        finished = start is not None and is_finished(run_dir, names[-1], config.stages[-1].max_steps, found[-1])
        tracking = stack.enter_context(make_tracking(config, credentials, resume=resume, has_trackers=not finished))
        stop = stack.enter_context(stop_on_signals())
        first = names.index(start.state["stage"]) if start else 0
        for index, stage in enumerate(config.stages):
            if index >= first:
                context = _Stage(config, stage, model, processor, data, run, bases, begin, stop, tracking)
                _run_stage(context, start if index == first else None)

        if finished:
            tell(finished_text(run_dir, [(stage.name, stage.max_steps) for stage in config.stages]))
            return run_dir

        # 5. The model as others read it, then the summary, which says that the run is whole
        with atomic_folder(run_dir / "model") as folder:
            save_model(model, processor, folder)
        atomic_write(run_dir / "train.json", json.dumps(run_summary(run, data, begin), indent=2) + "\n")
    return run_dir


@dataclass(slots=True)
class _Stage:
    """What one stage of a run is made from."""

    config: RunConfig
    stage: StageConfig
    model: Any
    processor: Any
    data: SpeechData
    run: RunState
    base_models: dict[str, dict[str, str]]
    begin: float
    stop: StopRequest
    tracking: RunTracking

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)


def _run_stage(context: _Stage, start: checkpoints.Checkpoint | None) -> None:
    """Train one stage, from its beginning or from a checkpoint in it, and add its summary to the run's."""
    config, stage, run = context.config, context.stage, context.run
    done = next((summary for summary in run.finished if summary["name"] == stage.name), None)
    seed_everything(config.seed, stage.name)
    matmul = MatmulRate() if stage.objective == "tune" and done is None else None
    task = TASKS[stage.objective](context.model, context.processor, context.data, stage, config.seed)
    if task.left_out and done is None:
        text = (
            f"stage {stage.name}: {len(task.left_out)} versions of {len(set(task.left_out))} clips have no transcript, "
            f"several recordings or fewer audio positions than tokens, and are left out, such as {task.left_out[0]} "
            "(all in train.json)"
        )
        tell(text)
    optim = stage.optim
    groups = task.parameter_groups()
    if not groups:
        raise UltravoxError(f"stage {stage.name} trains nothing: every learning rate is 0 or belongs to a frozen part")
    if stage.max_batch_memory_gb is not None:
        known = start.state["memory"] if start is not None else None
        memory = calibrate_task(task) if known is None else MemoryModel.from_json(known)
        task.limit_memory(memory, round(stage.max_batch_memory_gb * 1e9))
    optimizer = Optimizer(groups, weight_decay=optim.weight_decay, betas=optim.betas, eps=optim.eps)
    state = LoopState()
    if start is not None:
        task.load_trainable_state(start.trainable)
        optimizer.load_state_dict(start.optimizer)
        checkpoints.restore_random_state(start.state["random"])
        where = checkpoints.checkpoint_folder(context.run_dir, stage.name, start.state["step"])
        order = {stage.name: task.order.fingerprint}
        require_same({stage.name: start.state["order"]}, order, "the order of the data", where)
        state = LoopState(**start.state["loop"])
    if done is not None:
        return  # the checkpoint is that of the stage's end
    if start is not None:
        task.go_to(_position(state), start.state["stream"])

    last: dict[str, float] = {}
    tracking = _stage_tracking(context, state)

    def save(state: LoopState) -> None:
        if state.step == stage.max_steps:
            run.finished.append(stage_summary(stage, task, state, last, matmul))
            tell_mixture(stage.name, run.finished[-1]["mixture"])
            save_head(context.run_dir, stage.name, task)
        content = _checkpoint_content(context, task, state)
        folder = checkpoints.checkpoint_folder(context.run_dir, stage.name, state.step)
        checkpoint = checkpoints.Checkpoint(task.trainable_state(), optimizer.state_dict(), content)
        checkpoints.save_checkpoint(folder, checkpoint)
        if config.logging.upload_checkpoints:
            tracking.on_checkpoint(state.step, folder)
        checkpoints.remove_old_checkpoints(context.run_dir, [s.name for s in config.stages])

    settings = LoopSettings(
        stage=stage.name,
        max_steps=stage.max_steps,
        warmup_steps=optim.warmup_steps,
        schedule=optim.schedule,
        final_lr_share=optim.final_lr_share,
        max_grad_norm=optim.max_grad_norm,
        evaluate_every=stage.evaluate_every,
        checkpoint_every=stage.checkpoint_every,
        measure_every=stage.log_every,
    )
    loader = _loader(context, task)
    release_freed_memory()  # what the stage before has left
    keep_freed_memory()
    with ExitStack() as stack:
        stack.enter_context(killed_workers_explained())
        callbacks = [*_callbacks(context, state, last, stack), tracking, *([MatmulSamples(matmul)] if matmul else [])]
        run_stage(
            task,
            optimizer,
            settings,
            lambda at: loader.steps(_position(at)),
            state=state,
            callbacks=callbacks,
            save=save,
            stop=context.stop,
        )


def _stage_tracking(context: _Stage, state: LoopState) -> StageTracking:
    """The run's trackers, told of this stage. Their steps go on over the stages."""
    stages = context.config.stages
    first_step = sum(stage.max_steps for stage in stages[: stages.index(context.stage)])
    return StageTracking(
        context.tracking.started,
        context.stage.log_every,
        first_step=first_step,
        elapsed_seconds=state.seconds,
        num_transcripts=context.config.logging.num_transcripts,
    )


def _checkpoint_content(context: _Stage, task: SpeechTask, state: LoopState) -> dict[str, Any]:
    """All of a checkpoint that is not a tensor."""
    config, run, deciding = context.config, context.run, deciding_keys(context.config)
    return {
        "stage": context.stage.name,
        "step": state.step,
        "loop": state.to_json(),
        "random": checkpoints.random_state(),
        "resolved_config": config.model_dump(mode="json"),
        "config": deciding,
        "config_sha256": hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest(),
        "base_models": context.base_models,
        "data": context.data.fingerprints,
        "sizes": context.data.sizes,
        "order": task.order.fingerprint,
        "stream": task.stream_state(_position(state)),
        "memory": None if task.memory is None else task.memory.to_json(),
        "run": {
            "seconds": run.seconds + time.monotonic() - context.begin,
            "feature_cache_seconds": run.feature_cache_seconds,
            "peak_memory_bytes": max(run.peak_memory_bytes, peak_memory_bytes()),
            "finished": run.finished,
        },
    }


def _loader(context: _Stage, task: SpeechTask) -> Loader:
    options = context.config.data.loader
    return Loader(
        task.order,
        task.make_batch,
        batches_per_step=context.stage.accumulation_steps,
        workers=options.workers,
        prefetch=options.prefetch,
        pin_memory=torch.cuda.is_available(),
    )


def _position(state: LoopState) -> Position:
    return Position(state.epoch, state.window, state.batch)


class _Last:
    """Remembers the last loss and evaluation, for the summary."""

    def __init__(self, values: dict[str, float]) -> None:
        self.values = values

    def on_step(self, record: Any) -> None:
        self.values["loss"] = record.loss

    def on_evaluation(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        self.values.update(metrics)


def _callbacks(context: _Stage, state: LoopState, last: dict[str, float], stack: ExitStack) -> Sequence[Any]:
    """What watches the stage; `stack` closes each, also when the next one cannot be made."""
    stage = context.stage
    callbacks: list[Any] = []

    def add(callback: Any) -> None:
        stack.callback(callback.close)
        callbacks.append(callback)

    add(JsonLinesLog(context.run_dir / "log.jsonl", stage.log_every, state.seconds))
    if context.config.logging.tensorboard:
        if tensorboard_is_installed():
            folder = context.run_dir / "tensorboard" / stage.name
            add(TensorBoardLog(folder, stage.log_every, state.step, state.seconds))
        else:
            Console(stderr=True).print("TensorBoard is not installed: no tensorboard/ is written; log.jsonl is")
    if context.config.logging.samples:
        folder = samples_folder(context.run_dir, stage.name)
        log = SampleLog(folder, rank=0, world_size=1, attempt=next_attempt(folder), first_step=state.step)
        names = [source_key(source) for source in context.data.sources]
        add(StepSamples(log, names, streamed=context.config.data.streaming))
    add(TerminalProgress(stage.name, stage.max_steps, stage.log_every, elapsed_seconds=state.seconds))
    return [*callbacks, _Last(last)]


def seed_everything(seed: int, purpose: str) -> None:
    """Seed torch, numpy and python for one purpose, whatever was drawn before it."""
    number = int.from_bytes(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:4], "little")
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)
