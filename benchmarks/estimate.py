"""Holds the memory that `ultravox estimate` tells against what batches, and a whole run, take on this machine's CPU.

    python benchmarks/estimate.py [--rounds 3] [--cases NAME …] [--parts batch run]

Each case is a configuration of the quickstart's models, in processes of its own. `batch`: the stage's largest batch,
forwards and backwards, once as `ultravox estimate` runs it without memory and then in earnest; what PyTorch's allocator
hands out at most (its profiler says so), and by how much the resident memory rises at most. `run`: two steps a stage of
`ultravox train`; the largest resident memory of the process by the estimate's total and what Python and its libraries
take. In bfloat16, since the kernels that this project has for CPUs are of float32 alone.

The figures go to `benchmarks/results/estimate.json`; docs/estimate.md has them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "estimate.json"
CONFIG = ROOT / "configs" / "quickstart.yaml"
VERSION = 1
CASES: dict[str, list[str]] = {
    "adapters": [],
    "adapters, checkpointed layers": ["--performance.checkpoint_language_model", "true"],
    "whole encoder": ["--model.train_audio_encoder", "true"],
    "whole encoder, checkpointed layers": [
        *("--model.train_audio_encoder", "true", "--performance.checkpoint_audio_encoder", "true"),
        *("--performance.checkpoint_language_model", "true"),
    ],
    "no adapters": ["--model.language_model_lora.rank", "0"],
}
ALWAYS = ["--model.dtype", "bfloat16", "--stages.align.max_batch_tokens", "1600"]
SHORT = [
    *("--stages.align.max_steps", "2", "--stages.align.optim.warmup_steps", "1", "--stages.align.evaluate_every", "0"),
    *("--stages.tune.max_steps", "2", "--stages.tune.optim.warmup_steps", "1", "--stages.tune.evaluate_every", "0"),
    *("--evaluation.num_progress_clips", "1", "--logging.tensorboard", "false"),
]


def measure_batches(overrides: Sequence[str], rounds: int) -> dict[str, Any]:
    """Stage → bytes of its activations as estimated, as the allocator counts them, and as resident memory rises."""
    from ultravox.config.load import load_config
    from ultravox.estimate.batch import BatchWork
    from ultravox.estimate.run import choose_trainable, estimate_run, run_as_configured
    from ultravox.model.factory import build_model
    from ultravox.training.memory_probe import peak_on_cpu

    config = load_config(CONFIG, [*ALWAYS, *overrides])
    estimates = estimate_run(config)
    model = build_model(config.model)
    run_as_configured(model, config)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = {}
    for stage, estimate in zip(config.stages, estimates, strict=True):
        choose_trainable(trainable, stage)
        work = BatchWork(model, stage, 10.0, 60)
        work.prepare()
        work()  # what is made once
        found[stage.name] = {
            "positions": estimate.batch.tokens,
            "estimated": estimate.memory.activations,
            "allocated": [allocator_peak(work) for _ in range(rounds)],
            "resident": [peak_on_cpu(work) for _ in range(rounds)],
        }
    return found


def allocator_peak(work: Any) -> int:
    """Most bytes that PyTorch's allocator for CPUs has handed out at once while `work` runs, beside those of before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        most = max(most, held)
    return most


def measure_run(overrides: Sequence[str]) -> dict[str, Any]:
    """The largest resident memory of a run, the estimate's total, and what a process has before it has a model."""
    from ultravox.config.load import load_config
    from ultravox.estimate.run import estimate_run

    words = [*ALWAYS, *overrides]
    total = max(stage.memory.total for stage in estimate_run(load_config(CONFIG, words)))
    program = "import ultravox.training.run; print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    empty = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ultravox", "train", str(CONFIG), *words, *SHORT, "--run_dir", f"{folder}/run"]
        subprocess.run(command, check=True, capture_output=True)
        peak = json.loads((Path(folder) / "run" / "train.json").read_text())["peak_memory_bytes"]
    return {"estimated": total, "empty_process": 1024 * int(empty), "resident": peak}


def table(results: dict[str, Any]) -> list[str]:
    """In Markdown."""
    head = (
        "| Case | Stage, positions | Estimated | Allocated by estimated (range), n | Resident by estimated (range), n |"
    )
    rows = [head, "|---|---|---|---|---|"]
    for case, of_case in results["cases"].items():
        for stage, sizes in of_case["batch"].items():
            shares = [[value / sizes["estimated"] for value in sizes[kind]] for kind in ("allocated", "resident")]
            cells = [f"{sum(s) / len(s):.2f} ({min(s):.2f} to {max(s):.2f}), {len(s)}" for s in shares]
            size = f"{sizes['estimated'] / 1e6:,.0f} MB"
            rows.append(f"| {case} | `{stage}`, {sizes['positions']} | {size} | {' | '.join(cells)} |")
    rows += ["", "| Case | Whole run, estimated and the empty process | Resident | Ratio |", "|---|---|---|---|"]
    for case, of_case in results["cases"].items():
        run = of_case["run"]
        expected = run["estimated"] + run["empty_process"]
        cells = f"{expected / 1e9:.2f} GB | {run['resident'] / 1e9:.2f} GB | {run['resident'] / expected:.2f}"
        rows.append(f"| {case} | {cells} |")
    return rows


def main() -> None:
    """Each case in a process of its own, then the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--parts", nargs="*", choices=["batch", "run"], default=["batch", "run"])
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args()
    if args.one:
        overrides = CASES[args.one[0]]
        print(json.dumps(measure_run(overrides) if args.one[1] == "run" else measure_batches(overrides, args.rounds)))
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"version": VERSION, "cases": {}}
    for case in args.cases:
        of_case = results["cases"].setdefault(case, {})
        for what in args.parts:
            command = [sys.executable, __file__, "--rounds", str(args.rounds), "--one", case, what]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            of_case[what] = json.loads(output.splitlines()[-1])
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(case, "done", file=sys.stderr)
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
