"""One training run, from a configuration to a folder: `run_training`."""

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ultravox.auth.credentials import exported
from ultravox.config.load import dump_config
from ultravox.config.schema import RunConfig
from ultravox.data.sources import require_not_shrunk
from ultravox.errors import ConfigError
from ultravox.files import atomic_folder, atomic_write
from ultravox.model.factory import build_model, build_processor, save_model
from ultravox.model.performance import run_efficiently
from ultravox.training import checkpoint as checkpoints
from ultravox.training.checkpoint_store import download_newest, require_store
from ultravox.training.engines.base import Engine, describe
from ultravox.training.engines.factory import build_engine
from ultravox.training.engines.ranks import in_turn
from ultravox.training.engines.shards import whole
from ultravox.training.identity import base_models, deciding_keys
from ultravox.training.init_from import begin_from, find_start
from ultravox.training.interrupt import stop_on_signals
from ultravox.training.memory_guard import MemoryGuard
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
from ultravox.training.seeding import seed_everything
from ultravox.training.sharded_store import load_for_engine, open_store
from ultravox.training.speech import SpeechData, prepare_speech, trainable_of
from ultravox.training.stage import StageRun, train_stage
from ultravox.training.stream import prepare_stream
from ultravox.training.summary import RunState, announce, run_summary, tell
from ultravox.training.trackers.jsonl import drop_rows_after
from ultravox.training.trackers.registry import make_tracking


def run_training(config: RunConfig, resume: bool = False, overwrite: bool = False) -> Path:
    """Train as the configuration says.

    Args:
        config: of the run.
        resume: go on from the last checkpoint, bit for bit as if the run had not stopped.
        overwrite: replace an earlier run in the folder, once the new one is ready to begin.

    Returns: the run folder, with `model/` in the public format and `train.json`.

    Raises:
        ConfigError: the folder holds a run, and neither `resume` nor `overwrite` is set; or no checkpoint to resume.
        TrainingInterrupted: on Ctrl-C, SIGTERM, SIGUSR1 or too much memory, after a checkpoint was saved.
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
        start = load_for_engine(found[-1], engine) if resume else None
        if start is not None:
            require_same_config(start.state["config"], deciding_keys(config), found[-1])
        credentials = preflight(config)
        stack.enter_context(exported(credentials))
        require_transcripts(config)
        # 2. The model; its fresh weights are a function of the seed
        seed_everything(config.seed, "model")
        processor = build_processor(config.model)
        model = _build_model(config, engine)
        require_objectives(config, model, processor)
        bases = base_models(config)  # after loading: only then is a hub model's commit known
        if start is not None:
            require_same(start.state["base_models"], bases, "a base model", found[-1])
        begun = begin_from(config.init_from, run_dir, model, config.model, bases) if start is None else None

        # 3. The data: clips, tokens, features of the frozen encoder
        with in_turn(engine.rank, engine.world_size):
            data = _prepare(config, engine, model, processor)
        engine.prepare(model)
        data.trainable = trainable_of(model)
        run = RunState(feature_cache_seconds=data.cache_report.seconds, init_from=begun)
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
        guard = MemoryGuard.with_room(config.engine.max_memory_gb, engine)

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
        stop = stack.enter_context(stop_on_signals(guard.excess))
        store = stack.enter_context(open_store(run_dir, names, config.checkpoints, engine))
        first = names.index(start.state["stage"]) if start else 0
        for index, stage in enumerate(config.stages):
            if index >= first:
                context = StageRun(
                    config, stage, model, processor, data, run, bases, begin, stop, engine, store, tracking
                )
                train_stage(context, start if index == first else None)

        if finished:
            tell(finished_text(run_dir, [(stage.name, stage.max_steps) for stage in config.stages]))
            return run_dir

        store.join()
        # 5. The model as others read it, then the summary, which says that the run is whole
        state = {name: whole(value) for name, value in model.state_dict().items()} if engine.saves_parts else None
        if engine.is_main:
            with atomic_folder(run_dir / "model") as folder:
                save_model(model, processor, folder, state)
            summary = run_summary(run, data, begin) | {"engine": describe(engine)}
            atomic_write(run_dir / "train.json", json.dumps(summary, indent=2) + "\n")
    return run_dir


def _build_model(config: RunConfig, engine: Engine) -> Any:
    """On its device, in the form in which it trains."""
    model, performance = build_model(config.model).to(engine.device), config.performance
    run_efficiently(
        model,
        attention=performance.attention,
        compile_layers=performance.compile,
        liger=performance.liger,
        tf32=performance.tf32,
        checkpoint_language_model=performance.checkpoint_language_model,
        checkpoint_audio_encoder=performance.checkpoint_audio_encoder,
    )
    return model


def _take_folder(config: RunConfig, names: Sequence[str], stack: ExitStack, *, resume: bool, overwrite: bool) -> None:
    """Keep the run's folder for this run until `stack` closes, with a checkpoint in it if there is to be one."""
    run_dir, upload = Path(config.run_dir), config.checkpoints.upload
    if resume and upload is None:
        _require_checkpoint(run_dir, names)
    lock(run_dir, stack)
    if not resume:
        require_free(run_dir, overwrite=overwrite)
        if config.init_from is not None:
            find_start(config.init_from, run_dir)
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
