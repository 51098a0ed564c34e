"""One rank of a run on the real plan, loader, loop and logs; ranks go in step by gloo. Started by `test_data_order`.

    python train_rank.py CONFIG.json FOLDER ATTEMPT WORKERS LAST_STEP KILL_AT

A checkpoint of the loop's state is written every three steps. After step KILL_AT (0 = never) the process kills itself
as the system would: with SIGKILL, in the middle of everything.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from ultravox.config.schema import RunConfig
from ultravox.data.loader import Loader
from ultravox.data.order import Position
from ultravox.data.sample_log import SampleLog
from ultravox.files import atomic_write
from ultravox.model.factory import build_model, build_processor
from ultravox.training.optim import Optimizer
from ultravox.training.rows import source_key
from ultravox.training.speech import prepare_speech
from ultravox.training.trackers.samples import StepSamples, samples_folder
from ultravox.training.trainer import LoopSettings, LoopState, run_stage
from ultravox.training.tune import TuneTask

CHECKPOINT_EVERY = 3


class InStep:
    """Ranks wait for one another after each step, as gradients would make them; then the end may come."""

    def __init__(self, world_size: int, kill_at: int) -> None:
        self.world_size, self.kill_at = world_size, kill_at

    def on_step(self, record) -> None:
        if self.world_size > 1:
            total = torch.tensor([float(record.num_tokens)])
            dist.all_reduce(total)
            assert total.item() > record.num_tokens, "the other rank has had nothing"
        if record.step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_evaluation(self, stage, step, metrics) -> None:
        pass


def main() -> None:
    config_path, folder, attempt, workers, last_step, kill_at = sys.argv[1:]
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo")
    config = RunConfig.model_validate_json(Path(config_path).read_text())
    (stage,) = config.stages
    model, processor = build_model(config.model), build_processor(config.model)
    task = TuneTask(model, processor, prepare_speech(config, model, processor), stage, config.seed)
    optimizer = Optimizer(task.parameter_groups(), weight_decay=0.0, betas=(0.9, 0.99), eps=1e-8)
    checkpoint = Path(folder) / "checkpoint.json"
    state = LoopState(**json.loads(checkpoint.read_text())) if checkpoint.is_file() else LoopState()
    loader = Loader(
        task.order,
        task.make_batch,
        batches_per_step=stage.accumulation_steps,
        rank=rank,
        world_size=world_size,
        workers=int(workers),
    )

    def save(state: LoopState) -> None:
        if rank == 0:
            atomic_write(checkpoint, json.dumps(state.to_json()))

    log = SampleLog(
        samples_folder(Path(folder), stage.name),
        rank=rank,
        world_size=world_size,
        attempt=int(attempt),
        first_step=state.step,
    )
    names = [source_key(source) for source in config.data.sources]
    run_stage(
        task,
        optimizer,
        LoopSettings(stage.name, int(last_step), checkpoint_every=CHECKPOINT_EVERY),
        lambda state: loader.steps(Position(state.epoch, state.window, state.batch)),
        state=state,
        callbacks=[StepSamples(log, names), InStep(world_size, int(kill_at))],
        save=save,
    )


if __name__ == "__main__":
    main()
