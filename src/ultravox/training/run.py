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

from ultravox.auth.credentials import exported
from ultravox.config.load import dump_config
from ultravox.config.schema import RunConfig, StageConfig
from ultravox.data.loader import Loader, killed_workers_explained
from ultravox.data.order import Position, rank_slice
from ultravox.data.sources import require_not_shrunk
from ultravox.errors import ConfigError, UltravoxError
from ultravox.files import atomic_folder, atomic_write
from ultravox.model.factory import build_model, build_processor, save_model
from ultravox.model.fast import use_fast_kernels
from ultravox.training import checkpoint as checkpoints
from ultravox.training.align import AlignTask
from ultravox.training.checkpoint_store import CheckpointStore, download_newest, require_store
from ultravox.training.engines.base import Engine, describe
from ultravox.training.engines.factory import build_engine
from ultravox.training.engines.ranks import in_turn
from ultravox.training.engines.shards import whole
from ultravox.training.heads import save_head
from ultravox.training.identity import base_models, deciding_keys
from ultravox.training.interrupt import StopRequest, stop_on_signals
from ultravox.training.measure import MatmulRate, MatmulSamples, peak_memory_bytes
from ultravox.training.memory import keep_freed_memory, release_freed_memory
from ultravox.training.memory_model import MemoryModel
from ultravox.training.memory_probe import calibrate_task
from ultravox.training.optim import Optimizer
from ultravox.training.preflight import preflight, require_objectives, require_transcripts, tell_idle_rates
from ultravox.training.resume import (
    finished_text,
    is_finished,
    require_same,
    require_same_config,
    require_same_data,
)
from ultravox.training.rows import source_key, source_spec
from ultravox.training.run_folder import clear, lock, require_free
from ultravox.training.speech import SpeechData, prepare_speech, trainable_of
from ultravox.training.speech_task import SpeechTask
from ultravox.training.stream import prepare_stream
from ultravox.training.summary import RunState, announce, run_summary, stage_summary, tell, tell_mixture
from ultravox.training.trackers.jsonl import drop_rows_after
from ultravox.training.trackers.registry import make_tracking
from ultravox.training.trackers.tracking import RunTracking
from ultravox.training.trainer import LoopSettings, LoopState, run_stage
from ultravox.training.tune import TuneTask
from ultravox.training.watchers import track_stage, watch_stage

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
        TrainingInterrupted: on Ctrl-C, SIGTERM or SIGUSR1, after a checkpoint was saved.
        UltravoxError: whatever in the configuration, the data or a checkpoint does not fit.
    """
    with build_engine(config.engine, config.device) as engine:
        return _run_training(config, engine, resume=resume, overwrite=overwrite)


def _run_training(config: RunConfig, engine: Engine, *, resume: bool, overwrite: bool) -> Path:
    """`run_training`, on one of its ranks. Only the main one writes, but for logs of samples."""
    begin = time.monotonic()
    run_dir = Path(config.run_dir)
    names = [stage.name for stage in config.stages]
    with ExitStack() as stack:
        # 1. One run per run folder
        if engine.is_main:
            _take_folder(config, names, stack, resume=resume, overwrite=overwrite)
        found = engine.gather(checkpoints.list_checkpoints(run_dir, names))[0]
        start = checkpoints.load_checkpoint(found[-1]) if resume else None
        if start is not None:
            require_same_config(start.state["config"], deciding_keys(config), found[-1])

        credentials = preflight(config)
        stack.enter_context(exported(credentials))
        require_transcripts(config)
        # 2. The model; its fresh weights are a function of the seed
        seed_everything(config.seed, "model")
        processor = build_processor(config.model)
        model = build_model(config.model).to(engine.device)
        use_fast_kernels(model)
        require_objectives(config, model, processor)
        bases = base_models(config)  # after loading: only then is a hub model's commit known
        if start is not None:
            require_same(start.state["base_models"], bases, "a base model", found[-1])

        # 3. The data: clips, tokens, features of the frozen encoder
        with in_turn(engine.rank, engine.world_size):
            data = _prepare(config, engine, model, processor)
        engine.prepare(model)
        data.trainable = trainable_of(model)
        run = RunState(feature_cache_seconds=data.cache_report.seconds)
        if start is not None:
            for source in config.data.sources:
                key = source_key(source)
                require_not_shrunk(source_spec(source), start.state["sizes"].get(key, 0), data.sizes[key])
            require_same_data(start.state, data.fingerprints, data.sizes, found[-1])
            run = RunState(**start.state["run"])
            run.feature_cache_seconds += data.cache_report.seconds
        announce(model, data)
        for stage in config.stages:
            tell_idle_rates(config, stage)

        # 4. The stages. Only now that all is ready does an earlier run go, unless it is gone on with
        if engine.is_main:
            if not resume:
                clear(run_dir)
            atomic_write(run_dir / "config.yaml", dump_config(config))
            drop_rows_after(
                run_dir / "log.jsonl", names, *((start.state["stage"], start.state["step"]) if start else ())
            )
        engine.gather(None)  # nobody writes before the folder is clear
        finished = start is not None and is_finished(run_dir, names[-1], config.stages[-1].max_steps, found[-1])
        has_trackers = engine.is_main and not finished
        tracking = stack.enter_context(make_tracking(config, credentials, resume=resume, has_trackers=has_trackers))
        stop = stack.enter_context(stop_on_signals())
        store = stack.enter_context(CheckpointStore.from_config(run_dir, names, config.checkpoints))
        first = names.index(start.state["stage"]) if start else 0
        for index, stage in enumerate(config.stages):
            if index >= first:
                context = _Stage(
                    config, stage, model, processor, data, run, bases, begin, stop, engine, store, tracking
                )
                _run_stage(context, start if index == first else None)

        if finished:
            tell(finished_text(run_dir, [(stage.name, stage.max_steps) for stage in config.stages]))
            return run_dir

        store.join()
        # 5. The model as others read it, then the summary, which says that the run is whole
        state = {name: whole(value) for name, value in model.state_dict().items()} if engine.is_sharded else None
        if engine.is_main:
            with atomic_folder(run_dir / "model") as folder:
                save_model(model, processor, folder, state)
            summary = run_summary(run, data, begin) | {"engine": describe(engine)}
            atomic_write(run_dir / "train.json", json.dumps(summary, indent=2) + "\n")
    return run_dir


def _take_folder(config: RunConfig, names: Sequence[str], stack: ExitStack, *, resume: bool, overwrite: bool) -> None:
    """Keep the run's folder for this run until `stack` closes, with a checkpoint in it if there is to be one."""
    run_dir, upload = Path(config.run_dir), config.checkpoints.upload
    if resume and upload is None:
        _require_checkpoint(run_dir, names)
    lock(run_dir, stack)
    if not resume:
        require_free(run_dir, overwrite=overwrite)
    if upload is not None:
        require_store(upload)
        if resume and not checkpoints.list_checkpoints(run_dir, names):
            download_newest(upload, run_dir, names)
            _require_checkpoint(run_dir, names)


def _require_checkpoint(run_dir: Path, names: Sequence[str]) -> None:
    if not checkpoints.list_checkpoints(run_dir, names):
        instead = "begin with --overwrite" if (run_dir / "config.yaml").is_file() else "leave out --resume to begin"
        raise ConfigError(f"{run_dir} holds no checkpoint of these stages to go on from: {instead}")


def _prepare(config: RunConfig, engine: Engine, model: Any, processor: Any) -> SpeechData:
    """The data of this rank: all of it, or its part of a stream."""
    if config.data.streaming:
        return prepare_stream(config, model, processor, rank=engine.rank, world_size=engine.world_size)
    return prepare_speech(config, model, processor)


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
    engine: Engine
    store: CheckpointStore
    tracking: RunTracking

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)


def _run_stage(context: _Stage, start: checkpoints.Checkpoint | None) -> None:
    """Train one stage, from its beginning or from a checkpoint in it, and add its summary to the run's."""
    config, stage, run, engine = context.config, context.stage, context.run, context.engine
    done = next((summary for summary in run.finished if summary["name"] == stage.name), None)
    seed_everything(config.seed, stage.name)
    measured = stage.objective == "tune" and done is None and engine.is_main and engine.device.type == "cpu"
    matmul = MatmulRate() if measured else None
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
    optimizer = Optimizer(
        groups, weight_decay=optim.weight_decay, betas=optim.betas, eps=optim.eps, sum_over_ranks=engine.sum
    )
    if engine.rank:
        seed_everything(config.seed, f"{stage.name}, rank {engine.rank}")  # dropout of its own
    state = LoopState()
    if start is not None:
        state = _restore(context, task, optimizer, start, goes_on=done is None)
    if done is not None:
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
        checkpoint = checkpoints.Checkpoint(task.trainable_state(), optimizer.state_dict(), content)
        if engine.is_main:
            context.store.save(stage.name, state.step, checkpoint)
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
            _loop_settings(stage),
            lambda at: loader.steps(_position(at)),
            state=state,
            callbacks=callbacks,
            save=save,
            stop=context.stop,
            engine=engine,
        )


def _make_task(context: _Stage) -> SpeechTask:
    stage = context.stage
    task = TASKS[stage.objective](context.model, context.processor, context.data, stage, context.config.seed)
    task.is_sharded = context.engine.is_sharded
    return task


def _restore(
    context: _Stage, task: SpeechTask, optimizer: Optimizer, start: checkpoints.Checkpoint, *, goes_on: bool
) -> LoopState:
    """Put a stage to where a checkpoint in it stands, on this rank; its data too, if it `goes_on`.

    Raises:
        CheckpointError: it does not fit, or a stream was dealt to another number of ranks.
    """
    engine, stage, saved = context.engine, context.stage, start.state
    where = checkpoints.checkpoint_folder(context.run_dir, stage.name, saved["step"])
    task.load_trainable_state(start.trainable)
    optimizer.load_state_dict(start.optimizer)
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
    if goes_on:
        task.go_to(_position(state), saved["stream"] if mine is None else mine["stream"])
    return state


def _loop_settings(stage: StageConfig) -> LoopSettings:
    optim = stage.optim
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
    )


def _checkpoint_content(context: _Stage, task: SpeechTask, state: LoopState) -> dict[str, Any]:
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
        },
    }


def _loader(context: _Stage, task: SpeechTask) -> Loader:
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
        pin_memory=torch.cuda.is_available(),
    )


def _position(state: LoopState) -> Position:
    return Position(state.epoch, state.window, state.batch)


def seed_everything(seed: int, purpose: str) -> None:
    """Seed torch, numpy and python for one purpose, whatever was drawn before it."""
    number = int.from_bytes(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:4], "little")
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)
