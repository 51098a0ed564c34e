"""What happens inside of a step on two ranks: run on each by test_steps.py, prints one JSON object."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

from ultravox.config.load import load_config
from ultravox.config.optim import OptimConfig
from ultravox.data.order import Position
from ultravox.model.factory import build_model, build_processor
from ultravox.model.fast import use_fast_kernels
from ultravox.training.engines.factory import build_engine
from ultravox.training.engines.shards import is_shard, local_part
from ultravox.training.interrupt import StopRequest
from ultravox.training.optimizer_factory import build_optimizer
from ultravox.training.seeding import seed_everything
from ultravox.training.speech import prepare_speech, trainable_of
from ultravox.training.trainer import LoopSettings, LoopState, _forward_and_backward, _Loop
from ultravox.training.tune import TuneTask


def prepared(config, engine):
    seed_everything(config.seed, "model")
    processor, model = build_processor(config.model), build_model(config.model)
    use_fast_kernels(model)
    data = prepare_speech(config, model, processor)
    engine.prepare(model)
    data.trainable = trainable_of(model)
    task = TuneTask(model, processor, data, config.stages[-1], config.seed)
    task.is_sharded = engine.is_sharded
    optim = OptimConfig(weight_decay=0.0, betas=(0.9, 0.99), eps=1e-8, warmup_steps=0, lr={})
    return task, build_optimizer(task.parameter_groups(), optim, engine)


def gradients(engine, task, optimizer, batches):
    """Norm of the gradient over all ranks, after each rank's batches."""
    optimizer.zero_grad()
    task.train_mode()
    for batch in batches:
        _forward_and_backward(task, engine, 1.0, batch)
    engine.reduce(optimizer.parameters)
    return optimizer.step(divisor=1.0, max_grad_norm=1e9, lr_factor=0.0)  # which changes no weight


def of_text_alone(task, batch):
    """The same conversations, without their recordings."""
    heard = [ids != task.audio_token_id for ids in batch.input_ids]
    return replace(
        batch,
        input_ids=[ids[keep] for ids, keep in zip(batch.input_ids, heard, strict=True)],
        supervised=[marks[keep] for marks, keep in zip(batch.supervised, heard, strict=True)],
        audio_tokens=[[] for _ in batch.ids],
        num_windows=[0 for _ in batch.ids],
        values=batch.values[:0],
        lengths=batch.lengths[:0],
    )


def main(path: str) -> None:
    config = load_config(Path(path), [])
    with build_engine(config.engine) as engine:
        task, optimizer = prepared(config, engine)
        first, second = (task.batch(Position(0, 0, index)) for index in range(2))
        nothing = second._part(slice(0, 0), slice(0, 0), 0)
        assert not nothing.ids
        text = of_text_alone(task, second)
        mine = {"both": second, "one_has_nothing": nothing, "one_has_text_alone": text}
        found = {"rank": engine.rank}
        for name, batch in mine.items():
            of_rank = [first, batch] if engine.world_size == 1 else [batch if engine.rank else first]
            found[name] = gradients(engine, task, optimizer, of_rank)
        if engine.world_size > 1:
            found |= steps(engine, task, optimizer, first)
        found |= held(engine, task, optimizer)
    print(json.dumps(found))


def held(engine, task, optimizer):
    """How many numbers of weights and moments are shared out, and how many of them this rank has in memory."""
    layers = list(task.model.get_decoder().layers.parameters())
    states = optimizer._rule.optimizer.state
    if engine.kind in ("zero2", "zero3"):
        in_parts = [p for p in layers if hasattr(p, "ds_tensor")]
        assert all(p.numel() == 0 for p in in_parts), "layers are given back after a step"
        return {
            "numbers": sum(p.ds_numel for p in in_parts),
            "numbers_here": sum(p.ds_tensor.numel() for p in in_parts),
            "trained": sum(shape.numel() for shape in optimizer._shapes.values()),
            "moments_here": sum(state["exp_avg"].numel() for state in states.values()),
            "parts_here": optimizer.num_held,
        }
    shards = [p for p in task.model.parameters() if is_shard(p)]
    return {
        "numbers": sum(p.numel() for p in shards),
        "numbers_here": sum(local_part(p).numel() for p in shards),
        "trained": sum(p.numel() for p in optimizer._named.values() if is_shard(p)),
        "moments_here": sum(
            states[master]["exp_avg"].numel()
            for name, master in optimizer._masters.items()
            if is_shard(optimizer._named[name]) and master in states
        ),
    }


def weights(engine, task):
    return {n: t.clone() for n, t in engine.snapshot(task.trainable_state, task.trainable.values()).items()}


def steps(engine, task, optimizer, batch):
    """One step with an infinite gradient on rank 1 alone, then a sound one."""
    loop = _Loop(task, optimizer, LoopSettings("tune", max_steps=9), engine, StopRequest())

    step = SimpleNamespace(after=(0, 0, 1), batches=[SimpleNamespace(batch=batch)])
    real = engine.reduce
    before = weights(engine, task)

    def spoilt(parameters):
        if engine.rank == 1:
            for parameter in parameters:
                if parameter.grad is not None:
                    local_part(parameter.grad).view(-1)[:1] = float("inf")
                    break
        real(parameters)

    engine.reduce = spoilt
    record = loop._step(LoopState(), step)
    after = weights(engine, task)
    unchanged = all(torch.equal(before[name], after[name]) for name in before)
    engine.reduce = real
    sound = loop._step(LoopState(step=1), step)
    return {
        "skipped_ids": record.skipped_ids,
        "unchanged": unchanged,
        "sound": sound.skipped_ids is None and sound.grad_norm > 0,
    }


main(sys.argv[1])
