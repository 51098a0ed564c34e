"""One stage of a run: its task, optimizer, batches and checkpoints, from its beginning or from a checkpoint in it."""

import hashlib
import json
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ultravox.config.schema import RunConfig, StageConfig
from ultravox.data.loader import Loader, killed_workers_explained
from ultravox.data.order import Position, rank_slice
from ultravox.errors import UltravoxError
from ultravox.training import checkpoint as checkpoints
from ultravox.training.align import AlignTask
from ultravox.training.checkpoint_store import CheckpointStore
from ultravox.training.engines.base import Engine
from ultravox.training.heads import save_head
from ultravox.training.identity import deciding_keys
from ultravox.training.interrupt import StopRequest
from ultravox.training.measure import MatmulRate, MatmulSamples, peak_memory_bytes
from ultravox.training.memory import keep_freed_memory, release_freed_memory
from ultravox.training.memory_model import MemoryModel
from ultravox.training.memory_probe import calibrate_task
from ultravox.training.optim import Optimizer
from ultravox.training.optimizer_factory import build_optimizer
from ultravox.training.peak_rate import peak_rate
from ultravox.training.resume import (
    require_same,
)
from ultravox.training.seeding import seed_everything
from ultravox.training.sharded_store import parts_like
from ultravox.training.speech import SpeechData
from ultravox.training.speech_task import SpeechTask
from ultravox.training.summary import RunState, stage_summary, tell, tell_mixture
from ultravox.training.trackers.tracking import RunTracking
from ultravox.training.trainer import LoopSettings, LoopState, run_stage
from ultravox.training.tune import TuneTask
from ultravox.training.watchers import track_stage, watch_stage

TASKS: dict[str, type[SpeechTask]] = {"align": AlignTask, "tune": TuneTask}


@dataclass(slots=True)
class StageRun:
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
    engine: Engine
    store: CheckpointStore
    tracking: RunTracking

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)


def train_stage(context: StageRun, start: checkpoints.Checkpoint | None) -> None:
    """Train one stage, from its beginning or from a checkpoint in it, and add its summary to the run's."""
    config, stage, run, engine = context.config, context.stage, context.run, context.engine
    done = next((summary for summary in run.finished if summary["name"] == stage.name), None)
    seed_everything(config.seed, stage.name)
    rate = MatmulRate() if done is None and engine.is_main and engine.device.type == "cpu" else None
    matmul = rate if stage.objective == "tune" else None  # what the stage is held against
    task = _make_task(context)
    if task.left_out and done is None:
        text = (
            f"stage {stage.name}: {len(task.left_out)} versions of {len(set(task.left_out))} clips have no transcript, "
            f"several recordings or fewer audio positions than tokens (a lower model.stack_factor gives more), and are "
            f"left out, such as {task.left_out[0]} (all in train.json)"
        )
        tell(text)
    optim = stage.optim
    groups = task.parameter_groups()
    if not groups:
        raise UltravoxError(f"stage {stage.name} trains nothing: every learning rate is 0 or belongs to a frozen part")
    if stage.max_batch_memory_gb is not None:
        known = start.state["memory"] if start is not None else None
        memory = calibrate_task(task) if known is None else MemoryModel.from_json(known)
        memory = MemoryModel.from_json(engine.gather(memory.to_json())[0])  # one plan for all ranks
        task.limit_memory(memory, round(stage.max_batch_memory_gb * 1e9))
    if start is not None:
        task.load_trainable_state(parts_like(start.trainable, task.trainable_state()))
    optimizer = build_optimizer(groups, optim, engine) if done is None else None
    if engine.rank:
        seed_everything(config.seed, f"{stage.name}, rank {engine.rank}")  # dropout of its own
    state = LoopState()
    if start is not None:
        state = _restore(context, task, optimizer, start)
    if optimizer is None:
        return  # the checkpoint is that of the stage's end

    last: dict[str, float] = {}
    evaluated: dict[int, dict[str, float]] = {}
    tracking = track_stage(config, stage, context.tracking, state)

    def save(state: LoopState) -> None:
        if state.step == stage.max_steps:
            run.finished.append(stage_summary(stage, task, state, last, matmul))
            tell_mixture(stage.name, run.finished[-1]["mixture"])
            if engine.is_main:
                save_head(context.run_dir, stage.name, task)
        content = {**_checkpoint_content(context, task, state), "metrics": evaluated.get(state.step, {})}
        checkpoint = checkpoints.Checkpoint(
            engine.snapshot(task.trainable_state, task.trainable.values()), optimizer.state_dict(), content
        )
        if engine.is_main or engine.saves_parts:
            context.store.save(stage.name, state.step, checkpoint)
            if state.step == stage.max_steps or optimizer.averages:  # other weights take their places at once
                context.store.settle()
            if config.logging.upload_checkpoints:
                context.store.join()  # trackers read the files
                tracking.on_checkpoint(
                    state.step, checkpoints.checkpoint_folder(context.run_dir, stage.name, state.step)
                )

    loader = _loader(context, task)
    release_freed_memory()  # what the stage before has left
    keep_freed_memory()
    with ExitStack() as stack:
        stack.enter_context(killed_workers_explained())
        watchers = watch_stage(config, stage, context.data, engine, state, last, evaluated, stack)
        callbacks = [*watchers, tracking, *([MatmulSamples(matmul)] if matmul else [])]
        run_stage(
            task,
            optimizer,
            _loop_settings(config, stage, task, engine, rate),
            lambda at: loader.steps(_position(at)),
            state=state,
            callbacks=callbacks,
            save=save,
            settle=context.store.settle,
            stop=context.stop,
            engine=engine,
        )
    optimizer.finish()


def _make_task(context: StageRun) -> SpeechTask:
    stage = context.stage
    task = TASKS[stage.objective](context.model, context.processor, context.data, stage, context.config.seed)
    task.is_sharded = context.engine.is_sharded
    return task


def _restore(
    context: StageRun, task: SpeechTask, optimizer: Optimizer | None, start: checkpoints.Checkpoint
) -> LoopState:
    """Put a stage, whose weights are in place, to where a checkpoint in it stands, on this rank.

    Without an optimizer it does not go on, so that its data stays at the beginning.

    Raises:
        CheckpointError: it does not fit, or a stream was dealt to another number of ranks.
    """
    engine, stage, saved = context.engine, context.stage, start.state
    where = checkpoints.checkpoint_folder(context.run_dir, stage.name, saved["step"])
    if optimizer is not None:
        optimizer.load_state_dict(parts_like(start.optimizer, optimizer.targets()))
    mine = checkpoints.state_of_rank(saved, engine.rank, engine.world_size)
    if mine is not None:
        checkpoints.restore_random_state(mine["random"])
    require_same({stage.name: saved["order"]}, {stage.name: task.order.fingerprint}, "the order of the data", where)
    state = LoopState(**saved["loop"])
    if context.config.data.streaming:
        ranks = {"ranks": 1 + len(saved.get("other_ranks", []))}
        require_same(ranks, {"ranks": engine.world_size}, "the number of processes that share the streams", where)
        assert mine is not None
        state.epoch, state.window, state.batch = mine["position"]
    if optimizer is not None:
        task.go_to(_position(state), saved["stream"] if mine is None else mine["stream"])
    return state


def _loop_settings(
    config: RunConfig, stage: StageConfig, task: SpeechTask, engine: Engine, rate: MatmulRate | None
) -> LoopSettings:
    optim, performance, dtype = stage.optim, config.performance, task.model.dtype
    peak = peak_rate(engine.device, dtype, performance.peak_tflops)
    if peak is None and rate is not None and dtype == torch.float32:
        peak = rate.best
    return LoopSettings(
        stage=stage.name,
        max_steps=stage.max_steps,
        warmup_steps=optim.warmup_steps,
        schedule=optim.schedule,
        final_lr_share=optim.final_lr_share,
        max_grad_norm=optim.max_grad_norm,
        evaluate_every=stage.evaluate_every,
        checkpoint_every=stage.checkpoint_every,
        measure_every=stage.log_every,
        scales_loss=dtype == torch.float16,
        empty_cache_every=performance.empty_cache_every,
        peak_flops=None if peak is None else peak * engine.world_size,
    )


def _checkpoint_content(context: StageRun, task: SpeechTask, state: LoopState) -> dict[str, Any]:
    """All of a checkpoint that is not a tensor."""
    config, run, deciding = context.config, context.run, deciding_keys(context.config)
    position = _position(state)
    mine = {"random": checkpoints.random_state(), "stream": task.stream_state(position), "position": list(position)}
    of_ranks = context.engine.gather(mine)
    return {
        "stage": context.stage.name,
        "step": state.step,
        "loop": state.to_json(),
        "random": of_ranks[0]["random"],
        "resolved_config": config.model_dump(mode="json"),
        "config": deciding,
        "config_sha256": hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest(),
        "base_models": context.base_models,
        "data": context.data.fingerprints,
        "sizes": context.data.sizes,
        "order": task.order.fingerprint,
        "stream": of_ranks[0]["stream"],
        "other_ranks": of_ranks[1:],
        "memory": None if task.memory is None else task.memory.to_json(),
        "run": {
            "seconds": run.seconds + time.monotonic() - context.begin,
            "feature_cache_seconds": run.feature_cache_seconds,
            "peak_memory_bytes": max(run.peak_memory_bytes, peak_memory_bytes()),
            "finished": run.finished,
            "init_from": run.init_from,
        },
    }


def _loader(context: StageRun, task: SpeechTask) -> Loader:
    options, engine, per_step = context.config.data.loader, context.engine, context.stage.accumulation_steps
    rank, world_size = engine.rank, engine.world_size
    mine = rank_slice(0, per_step, rank, world_size)
    if task.data.stream is not None:  # each rank has an order of its own
        per_step, rank, world_size = len(mine), 0, 1
    return Loader(
        task.order,
        task.make_batch,
        batches_per_step=per_step,
        rank=rank,
        world_size=world_size,
        workers=options.workers,
        prefetch=options.prefetch,
        pin_memory=options.pin_memory and engine.device.type == "cuda",
    )


def _position(state: LoopState) -> Position:
    return Position(state.epoch, state.window, state.batch)
