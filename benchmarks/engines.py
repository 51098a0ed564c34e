"""What a run costs beside its passes: the loop and its engine, checkpoints, and a second process.

    python benchmarks/engines.py [--rounds 5] [--parts loop checkpoint ranks]

All on the quickstart's stages `align` and `tune`, with its batches, on this machine's CPU. Nothing else may run on it.

`loop`: the loop of `ultravox train` with its engine, logs and records, against a bare loop over the same batches in
memory: the same task, forward, backward, clipping, PyTorch's fused AdamW. Blocks of a few steps, in pairs of which each
time another one goes first; of each pair the ratio of their times.

`checkpoint`: how long a save holds the loop up, with `checkpoints.background` and without, with the same checkpoint of
the stage `tune`, in turn; in the background also how long the next update waits for the copy, after a step of `align`.
Beside it, how much longer the steps take that are made while one is copied and written.

`ranks`: two processes (ddp) of one thread each against one process of two threads, whole runs of
`ultravox train` with the same two batches a step, in turn; the examples are the same. Of each stage, the time from the
first step after the warm-up to the last, and the ratio of throughputs.

Medians, with the 95% bootstrap interval of the median. The figures go to `benchmarks/results/engines.json`, in
which those of the other parts stay.
"""

import argparse
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "engines.json"
CONFIG = ROOT / "configs" / "quickstart.yaml"
VERSION = 1
#: Stage → steps of a block, pairs of blocks in a round.
BLOCKS = {"align": (10, 4), "tune": (2, 2)}
SAVES_A_ROUND = 4
#: Stage → steps of a whole run on ranks; so many of them are not counted.
RANK_STEPS, WARM_UP = {"align": 60, "tune": 9}, 2
#: In so many steps the losses must be the same; rounding grows from step to step, so that later ones drift apart.
SAME_STEPS = 3
#: Over both ranks together as many tokens a step as the quickstart has.
SPLIT = ("--stages.{0}.accumulation_steps", "2", "--stages.{0}.max_batch_tokens", "{1}")
LIMITS = {"loop": ("at most", 1.03), "checkpoint": ("at most", 0.05), "ranks": ("at least", 0.9)}


def median_and_interval(values: Sequence[float], num_samples: int = 2000) -> dict[str, float]:
    """The median, and the percentile bootstrap's 95% interval of it."""
    found = np.asarray(values)
    drawn = np.random.default_rng(0).choice(found, (num_samples, len(found)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return {"median": float(np.median(found)), "low": float(low), "high": float(high), "n": len(found)}


class Workbench:
    """Model, data and tasks of the quickstart, as a run builds them."""

    def __init__(self) -> None:
        from ultravox.config.load import load_config
        from ultravox.model.factory import build_model, build_processor
        from ultravox.model.fast import use_fast_kernels
        from ultravox.training.memory import keep_freed_memory
        from ultravox.training.seeding import seed_everything
        from ultravox.training.speech import prepare_speech
        from ultravox.training.stage import TASKS

        self.config = load_config(CONFIG)
        seed_everything(0, "model")
        self.processor, self.model = build_processor(self.config.model), build_model(self.config.model)
        use_fast_kernels(self.model)
        data = prepare_speech(self.config, self.model, self.processor)
        self.stages = {stage.name: stage for stage in self.config.stages}
        self._make = lambda stage: TASKS[stage.objective](self.model, self.processor, data, stage, self.config.seed)
        keep_freed_memory()

    def task(self, name: str) -> Any:
        """Of a stage, ready to train."""
        task = self._make(self.stages[name])
        task.parameter_groups()
        task.train_mode()
        return task


class _Over(Exception):
    """The block's steps are made."""


class OurLoop:
    """Blocks of steps as `ultravox train` makes them, with its logs."""

    def __init__(self, stage: Any, task: Any, folder: Path) -> None:
        from rich.console import Console

        from ultravox.training.engines.base import Engine
        from ultravox.training.optim import Optimizer
        from ultravox.training.progress import TerminalProgress
        from ultravox.training.trackers.jsonl import JsonLinesLog
        from ultravox.training.trainer import LoopSettings, LoopState

        optim = stage.optim
        self.task, self.state, self.engine = task, LoopState(), Engine()
        options = {"weight_decay": optim.weight_decay, "betas": optim.betas, "eps": optim.eps}
        self.optimizer = Optimizer(task.parameter_groups(), **options)
        self.settings = LoopSettings(
            stage.name, 10**9, schedule="constant", max_grad_norm=optim.max_grad_norm, measure_every=stage.log_every
        )
        console = Console(file=io.StringIO())
        log = JsonLinesLog(folder / f"{stage.name}.jsonl", stage.log_every)
        self.callbacks = [log, TerminalProgress(stage.name, 10**9, stage.log_every, console)]

    def __call__(self, batches: Sequence[Any]) -> None:
        from ultravox.data.loader import Loaded, LoadedStep
        from ultravox.data.order import Position
        from ultravox.training.trainer import run_stage

        def load(state: Any) -> Iterator[LoadedStep]:
            for index, batch in enumerate(batches):
                after = Position(0, 0, index + 1)
                yield LoadedStep([Loaded(batch, Position(0, 0, index), 0, after, 0)], after)
            raise _Over

        try:
            options = {"state": self.state, "callbacks": self.callbacks, "engine": self.engine}
            run_stage(self.task, self.optimizer, self.settings, load, **options)
        except _Over:
            return


class BareLoop:
    """The same steps as a script would write them."""

    def __init__(self, stage: Any, task: Any) -> None:
        import torch

        optim, self.task = stage.optim, task
        self.most = optim.max_grad_norm
        groups = [{"params": list(group.parameters.values()), "lr": group.lr} for group in task.parameter_groups()]
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        options = {"betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay}
        self.optimizer = torch.optim.AdamW(groups, fused=True, **options)
        self.losses: list[float] = []

    def __call__(self, batches: Sequence[Any]) -> None:
        import torch

        for batch in batches:
            self.optimizer.zero_grad()
            output = self.task.loss(batch)
            (output.sum / output.count).backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, self.most)
            self.optimizer.step()
            self.losses.append(output.sum.item() / output.count)


def seconds_of(act: Callable[[], object]) -> float:
    """How long it takes."""
    begin = time.perf_counter()
    act()
    return time.perf_counter() - begin


def loop(bench: Workbench, folder: Path, rounds: int) -> dict[str, Any]:
    """Stage → our loop's time by the bare loop's."""
    from ultravox.data.order import Position

    found = {}
    for name, (steps, pairs) in BLOCKS.items():
        stage, task = bench.stages[name], bench.task(name)
        batches = [task.batch(Position(0, 0, index)) for index in range(steps)]
        variants = {"ours": OurLoop(stage, task, folder), "bare": BareLoop(stage, task)}
        for variant in variants.values():  # kernels are compiled, moments are there
            variant(batches)
        ratios, bare = [], []
        for number in range(rounds * pairs):
            order = list(variants) if number % 2 else list(variants)[::-1]
            seconds = {variant: seconds_of(partial(variants[variant], batches)) for variant in order}
            ratios.append(seconds["ours"] / seconds["bare"])
            bare.append(seconds["bare"] / steps)
        found[name] = median_and_interval(ratios) | {"bare_step_seconds": statistics.median(bare)}
        print(name, found[name], file=sys.stderr, flush=True)
    return found


def checkpoint(bench: Workbench, folder: Path, rounds: int) -> dict[str, Any]:
    """How long a save holds training up."""
    from ultravox.data.order import Position
    from ultravox.training.checkpoint import Checkpoint, random_state
    from ultravox.training.checkpoint_store import CheckpointStore

    task = bench.task("tune")
    ours = OurLoop(bench.stages["tune"], task, folder)
    ours([task.batch()])
    saved = Checkpoint(task.trainable_state(), ours.optimizer.state_dict(), {"random": random_state()})
    num_bytes = sum(t.numel() * t.element_size() for part in (saved.trainable, saved.optimizer) for t in part.values())
    aligning = bench.task("align")
    beside = OurLoop(bench.stages["align"], aligning, folder)
    batches = [aligning.batch(Position(0, 0, index)) for index in range(3)]
    beside(batches)
    alone = [seconds_of(lambda: beside(batches)) / len(batches) for _ in range(10)]
    stores = {
        name: CheckpointStore(folder / name, ["tune"], background=name == "background")
        for name in ("foreground", "background")
    }
    held: dict[str, list[float]] = {name: [] for name in stores}
    longer = []
    for number in range(rounds * SAVES_A_ROUND + 1):
        for name in list(stores) if number % 2 else list(stores)[::-1]:
            held[name].append(seconds_of(partial(stores[name].save, "tune", number + 1, saved)))
            if name == "background":
                steps, begin = 1, time.perf_counter()
                beside(batches[:1])
                held[name][-1] += seconds_of(stores[name].settle)  # as before the update of the next step
                while (thread := stores[name]._thread) is not None and thread.is_alive():
                    beside(batches)
                    steps += len(batches)
                longer.append(time.perf_counter() - begin - steps * statistics.median(alone))
                stores[name].join()
    held = {name: values[1:] for name, values in held.items()}  # the first ones fetch memory
    pairs = zip(held["background"], held["foreground"], strict=True)
    return {"tune": median_and_interval([a / b for a, b in pairs])} | {
        "megabytes": num_bytes / 1e6,
        "foreground_seconds": statistics.median(held["foreground"]),
        "background_seconds": statistics.median(held["background"]),
        "steps_meanwhile_longer_by_seconds": statistics.median(longer[1:]),
    }


def free_port() -> int:
    """Of this machine."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def train(run_dir: Path, world_size: int, stages: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """A run of so many processes, two threads in all: stage → seconds since its start and loss, of each step.

    Raises:
        SystemExit: it failed.
    """
    words = ["--run_dir", str(run_dir), "--engine.kind", "ddp" if world_size > 1 else "single"]
    words += ["--evaluation.num_progress_clips", "1", "--logging.tensorboard", "false"]
    for name, stage in stages.items():
        words += [word.format(name, stage.max_batch_tokens // 2) for word in SPLIT]
        words += [f"--stages.{name}.max_steps", str(RANK_STEPS[name]), f"--stages.{name}.optim.warmup_steps", "1"]
        words += [f"--stages.{name}.evaluate_every", "0", f"--stages.{name}.log_every", "1"]
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world_size)}
    processes = []
    for rank in range(world_size):
        env = {**os.environ, "OMP_NUM_THREADS": str(2 // world_size)}
        if world_size > 1:
            env |= {**places, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, "-m", "ultravox", "train", str(CONFIG), *words]
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
    errors = [process.communicate()[1] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit(f"a run on {world_size} processes failed: {errors[0].decode()[-2000:]}")
    rows = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return {
        name: [(r["elapsed_seconds"], r["loss"]) for r in rows if r["stage"] == name and "loss" in r] for name in stages
    }


def counted_seconds(steps: Sequence[tuple[float, float]]) -> float:
    """From the end of the warm-up to the end of the last step."""
    return steps[-1][0] - steps[WARM_UP - 1][0]


def ranks(folder: Path, rounds: int) -> dict[str, Any]:
    """Stage → throughput of two processes by that of one."""
    from ultravox.config.load import load_config

    stages = {stage.name: stage for stage in load_config(CONFIG).stages}
    ratios: dict[str, list[float]] = {name: [] for name in stages}
    alone: dict[str, list[float]] = {name: [] for name in stages}
    for number in range(rounds):
        found = {}
        for world_size in (1, 2) if number % 2 else (2, 1):
            found[world_size] = train(folder / f"{number}-{world_size}", world_size, stages)
        for name in stages:
            losses = [[loss for _, loss in found[size][name][:SAME_STEPS]] for size in (1, 2)]
            if not np.allclose(*losses, rtol=1e-4):
                sys.exit(f"{name}: the losses of one and two processes differ: {losses}")
            ratios[name].append(counted_seconds(found[1][name]) / counted_seconds(found[2][name]))
            alone[name].append(counted_seconds(found[1][name]) / (RANK_STEPS[name] - WARM_UP))
        print({name: values[-1] for name, values in ratios.items()}, file=sys.stderr, flush=True)
    return {
        name: median_and_interval(ratios[name]) | {"one_process_step_seconds": statistics.median(alone[name])}
        for name in stages
    }


WHAT = {
    "loop": "time of our loop by a bare loop's, `{}`",
    "checkpoint": "a save in the background by one that training waits for, `{}`",
    "ranks": "throughput of two processes of one thread by one process of two, `{}`",
}


def table(found: dict[str, Any]) -> str:
    """The figures for docs/distributed.md."""
    lines = ["| | Median (95% interval), n | Wanted |", "|---|---|---|"]
    for part, (words, limit) in LIMITS.items():
        for stage, values in found.get(part, {}).items():
            if isinstance(values, dict):
                figure = f"{values['median']:.3f} ({values['low']:.3f} to {values['high']:.3f}), {values['n']}"
                lines.append(f"| {WHAT[part].format(stage)} | {figure} | {words} {limit:g} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of each part (default %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=list(LIMITS), default=list(LIMITS), help="default: all")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the figures go (default: the kept ones)")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds takes a number from 1, got {args.rounds}")
    import torch

    found: dict[str, Any] = json.loads(args.results.read_text()) if args.results.is_file() else {}
    found |= {"version": VERSION, "cpus": os.cpu_count(), "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "ranks" in args.parts:  # first: no model of this process lies beside theirs in memory
            found["ranks"] = ranks(folder, args.rounds)
        if {"loop", "checkpoint"} & set(args.parts):
            bench = Workbench()
            for part, measure in (("loop", loop), ("checkpoint", checkpoint)):
                if part in args.parts:
                    found[part] = measure(bench, folder, args.rounds)
    args.results.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    print(table(found))


if __name__ == "__main__":
    main()
