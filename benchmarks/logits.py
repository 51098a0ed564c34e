"""What it saves to make logits of supervised positions alone, and what the token metrics cost.

    python benchmarks/logits.py [--rounds 5] [--output benchmarks/results/logits.json]

A step is forward and backward of SmolLM2-135M with LoRA over 1,450 positions in sequences of 30 to 60, on a CPU. A
quarter of them is supervised. `supervised` is what the task `tune` does; `full` makes the logits of every position and
leaves the others out of the loss, as language models in transformers do by themselves. Each round runs each in its own
process, in turn, so that its peak memory is its own; all rounds are one run. The metrics' cost is timed inside
`supervised`: the best token of each row beside the largest logit (which the loss needs anyway), the counts, and the
gradient and update norms of every part in one step of five.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEPS = 4
NUM_TOKENS = 1450
MEASURE_EVERY = 5  # `log_every` of the quickstart's `tune`
VARIANTS = ("supervised", "full")
VERSION = 1


def measure(variant: str, num_tokens: int, steps: int) -> dict[str, float]:
    """Median seconds of a step, peak memory of the process, and (supervised) seconds of the metrics in a step."""
    import torch.nn.functional as F
    from tuning import batch, packed

    from ultravox.config.model import LoraConfig
    from ultravox.model.adapters import add_lora
    from ultravox.model.factory import load_language_model
    from ultravox.model.fast_attention import use_fast_attention
    from ultravox.model.fast_mlp import use_fast_mlps
    from ultravox.model.kernels import linear, register_attention, use_fast_norms
    from ultravox.objectives.cross_entropy import cross_entropy_with_best
    from ultravox.training.measure import memory_bytes, peak_memory_bytes
    from ultravox.training.memory import keep_freed_memory
    from ultravox.training.optim import Optimizer, ParameterGroup

    model: Any = load_language_model("smollm2-135m-instruct").requires_grad_(False)
    defaults = LoraConfig(rank=16)
    add_lora(model, defaults.rank, defaults.effective_alpha, defaults.target_modules)
    model.train()
    for prepare in (use_fast_norms, use_fast_mlps, use_fast_attention):
        prepare(model)
    model.set_attn_implementation(register_attention())
    use_fast_attention(model)
    keep_freed_memory()
    head = model.get_output_embeddings().weight
    adapters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    group = ParameterGroup("language_model", adapters, 1e-4)
    optimizer = Optimizer([group], weight_decay=0, betas=(0.9, 0.99), eps=1e-8)
    before, seconds, metrics = memory_bytes(), [], []
    for step in range(steps + 1):
        inputs, labels, mask = batch(num_tokens, model.config.hidden_size, step)
        inputs.requires_grad_(True)
        optimizer.zero_grad()
        start = time.perf_counter()
        hidden = packed(model.get_decoder(), inputs, mask)
        if variant == "full":
            logits = linear(hidden, head)
            following = F.pad(labels[:, 1:], (0, 1), value=-100)
            total = F.cross_entropy(logits.flatten(0, 1), following.flatten(), ignore_index=-100, reduction="sum")
        else:
            total, best = cross_entropy_with_best(hidden, labels, head)
        total.backward()
        took = time.perf_counter() - start
        if step:  # the first one fetches memory and compiles kernels
            seconds.append(took)
            if variant == "supervised":
                metrics.append(metric_seconds(hidden, labels, head, best, optimizer))
    found = {"step_seconds": statistics.median(seconds), "peak_bytes": peak_memory_bytes() - before}
    return found | ({"metric_seconds": statistics.median(metrics)} if metrics else {})


def metric_seconds(hidden: Any, labels: Any, head: Any, best: Any, optimizer: Any) -> float:
    """What the metrics add to this step."""
    import numpy as np
    import torch

    from ultravox.metrics.token_predictions import count_predictions, pool_predictions
    from ultravox.model.kernels import matmul_transposed
    from ultravox.objectives.cross_entropy import _HEAD_ROWS, best_tokens, next_token_positions

    with torch.no_grad():
        positions, targets = next_token_positions(labels)
        blocks = hidden.flatten(0, 1)[positions].split(_HEAD_ROWS)
        added = 0.0
        for block in blocks:
            logits = matmul_transposed(block, head)
            plain, ours = timed(lambda: logits.amax(-1, keepdim=True)), timed(lambda: best_tokens(logits))  # noqa: B023
            added += max(0.0, ours - plain)

    def count() -> None:
        width = labels.shape[1]
        where = (positions + 1).numpy()
        cuts = np.flatnonzero(np.diff(where // width)) + 1
        parts = zip(*(np.split(array, cuts) for array in (best.numpy(), targets.numpy(), where)), strict=True)
        pool_predictions([count_predictions(*part) for part in parts])

    added += timed(count)
    plain = timed(lambda: optimizer.step(divisor=1.0, max_grad_norm=1.0, lr_factor=0.0))
    measured = timed(lambda: optimizer.step(divisor=1.0, max_grad_norm=1.0, lr_factor=0.0, measure=True))
    return added + max(0.0, measured - plain) / MEASURE_EVERY


def timed(call: Callable[[], object]) -> float:
    """Median of three."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def summary(values: list[float]) -> dict[str, float]:
    """Mean, least and most."""
    return {"mean": statistics.mean(values), "least": min(values), "most": max(values), "n": len(values)}


def main() -> None:
    """Run the rounds, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="processes for each variant (default %(default)s)")
    parser.add_argument("--output", type=Path, help="also write the figures there, as JSON")
    parser.add_argument("--tokens", type=int, default=NUM_TOKENS, help="positions of a batch (default %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="of a process (default %(default)s)")
    parser.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child, args.tokens, args.steps)))
        return
    runs: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(args.rounds):
        for variant in VARIANTS:
            command = [sys.executable, __file__, "--child", variant]
            command += ["--tokens", str(args.tokens), "--steps", str(args.steps)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            runs[variant].append(json.loads(done.stdout.splitlines()[-1]))
    pairs = list(zip(runs["supervised"], runs["full"], strict=True))
    result: dict[str, Any] = {
        "version": VERSION,
        "positions": args.tokens,
        "supervised_share": 0.25,
        **{
            variant: {key: summary([run[key] for run in found]) for key in ("step_seconds", "peak_bytes")}
            for variant, found in runs.items()
        },
        "time_of_full": summary([full["step_seconds"] / ours["step_seconds"] for ours, full in pairs]),
        "memory_of_full": summary([full["peak_bytes"] / ours["peak_bytes"] for ours, full in pairs]),
        "metrics_share": summary([run["metric_seconds"] / run["step_seconds"] for run in runs["supervised"]]),
    }
    for variant in VARIANTS:
        one = result[variant]
        print(f"{variant:12} {one['step_seconds']['mean']:6.2f} s a step  {one['peak_bytes']['mean'] / 1e9:5.2f} GB")
    for key, what in (("time_of_full", "time"), ("memory_of_full", "memory")):
        one = result[key]
        interval = f"[{one['least']:.2f}, {one['most']:.2f}]"
        print(f"full logits take {one['mean']:.2f} × the {what} {interval}, n = {one['n']}")
    one = result["metrics_share"]
    print(f"metrics: {one['mean']:.2%} of a step [{one['least']:.2%}, {one['most']:.2%}], n = {one['n']}")
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
