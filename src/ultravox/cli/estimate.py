"""``ultravox estimate``: what a run will take on each GPU, before there is one."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ultravox.errors import ConfigError

if TYPE_CHECKING:
    from ultravox.estimate.run import StageEstimate

HELP = (
    "Estimate what a run will take: parameters, memory on each rank, tokens a second, hours. Shapes alone are needed: "
    "nothing is downloaded but a model's config.json, and no GPU is used. Exit code 1 when it does not fit."
)
TAKES_OVERRIDES = True
EXIT_DOES_NOT_FIT = 1
#: Share of a GPU's memory that the estimate may fill: allocators hold back what they cannot use (docs/estimate.md).
USABLE = 0.8
ROWS = ("weights", "gradients", "optimizer", "activations", "update", "evaluation", "total")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The config file and the machine; every other --key is a key of the config."""
    parser.usage = "ultravox estimate CONFIG [--ranks N] [--gpu NAME] [--mfu SHARE] [--json] [--KEY VALUE …]"
    parser.add_argument("config", metavar="CONFIG", type=Path, help="YAML file of the run, such as configs/gpu/*.yaml")
    parser.add_argument("--ranks", metavar="N", type=_positive(int), default=1, help="processes, one GPU each (1)")
    parser.add_argument("--gpu", metavar="NAME", help="H200, H100, A100-80GB, A100-40GB, L40S, L4, A10 or T4")
    parser.add_argument(
        "--peak-tflops", metavar="X", type=_positive(float), help="what the GPU can at best, in place of --gpu's"
    )
    parser.add_argument(
        "--memory-gb", metavar="X", type=_positive(float), help="what the GPU has (10^9 bytes), in place of --gpu's"
    )
    parser.add_argument(
        "--mfu", metavar="SHARE", type=_share, default=0.35, help="share of the peak rate that is reached (0.35)"
    )
    parser.add_argument(
        "--clip-seconds", metavar="X", type=_positive(float), default=10.0, help="audio of each row of a batch (10)"
    )
    parser.add_argument(
        "--text-tokens", metavar="N", type=_positive(int), default=60, help="text of each row of a tune batch (60)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object (format version 1)")


def epilog() -> str:
    """Examples."""
    return (
        "examples:\n"
        "  ultravox estimate configs/quickstart.yaml\n"
        "  ultravox estimate configs/gpu/whisper-large-v3-turbo-llama-3.1-8b.yaml --gpu H100 --ranks 8\n"
        "  ultravox estimate configs/gpu/lora-24gb.yaml --gpu L4 --stages.tune.max_batch_tokens 2048"
    )


def run(args: argparse.Namespace) -> int:
    """Estimate, print a table for each stage, then whether it fits."""
    import json

    from ultravox.config.load import load_config
    from ultravox.estimate.gpus import GPU_MEMORY

    if args.gpu is not None and args.gpu not in GPU_MEMORY:
        raise ConfigError(
            f"--gpu {args.gpu}: expected {', '.join(GPU_MEMORY)}; for another one give --peak-tflops and --memory-gb"
        )
    config = load_config(args.config, args.overrides)

    from ultravox.estimate.run import FORMAT_VERSION, estimate_run
    from ultravox.training.peak_rate import gpu_rate

    rate = args.peak_tflops * 1e12 if args.peak_tflops else None
    if rate is None and args.gpu is not None:
        if config.model.dtype == "float32":
            raise ConfigError("--gpu's rates are of 16-bit numbers: set --model.dtype bfloat16, or give --peak-tflops")
        rate = gpu_rate(args.gpu)
    memory = args.memory_gb * 1e9 if args.memory_gb else GPU_MEMORY.get(args.gpu)
    stages = estimate_run(
        config,
        ranks=args.ranks,
        flops_per_second=None if rate is None else rate * args.mfu,
        clip_seconds=args.clip_seconds,
        text_tokens=args.text_tokens,
    )
    worst = max(stage.memory.total for stage in stages)
    fits = None if memory is None else worst <= USABLE * memory
    if args.json:
        content = {
            "version": FORMAT_VERSION,
            "ranks": args.ranks,
            "gpu_memory_bytes": memory,
            "fits": fits,
            "stages": [stage.to_json() for stage in stages],
        }
        print(json.dumps(content))
    else:
        _show(stages, args.ranks)
        if rate is None:
            print("Time: give --gpu or --peak-tflops.")
        print(_verdict(worst, memory, fits))
    return EXIT_DOES_NOT_FIT if fits is False else 0


def _show(stages: "Sequence[StageEstimate]", ranks: int) -> None:
    from ultravox.cli.names import print_table

    first = stages[0]
    parts = [part for part, count in first.parameters.items() if count]
    head = ("parameters", "all", *(f"train in {stage.name}" for stage in stages))
    table = [
        (part, f"{first.parameters[part]:,}", *(f"{stage.trainable[part]:,}" for stage in stages)) for part in parts
    ]
    sums = (sum(stage.trainable.values()) for stage in stages)
    table.append(("total", f"{sum(first.parameters.values()):,}", *(f"{number:,}" for number in sums)))
    print_table(head, table)
    print()
    rows = [(row, *(_gb(_memory(stage, row)) for stage in stages)) for row in ROWS]
    print_table((f"memory on each of {ranks}", *(stage.name for stage in stages)), rows)
    print()
    facts = [
        ("largest batch", *(f"{s.batch.rows} × ({s.batch.audio_tokens} + {s.batch.text_tokens})" for s in stages)),
        ("positions a second", *(_number(stage.tokens_per_second) for stage in stages)),
        ("audio seconds a second", *(_number(stage.audio_seconds_per_second) for stage in stages)),
        ("hours", *(_number(stage.hours) for stage in stages)),
    ]
    print_table(("speed of all", *(stage.name for stage in stages)), facts)
    print()


def _memory(stage: "StageEstimate", row: str) -> int:
    number: int = getattr(stage.memory, row)
    return number


def _gb(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number else "-"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _verdict(worst: int, memory: float | None, fits: bool | None) -> str:
    if memory is None:
        return f"At the worst moment {worst / 1e9:.2f} GB: give --gpu or --memory-gb to hear whether that fits."
    room = f"{worst / 1e9:.2f} GB of {memory / 1e9:g} GB, of which {USABLE:.0%} can be counted on"
    if fits:
        return f"Fits: {room}."
    return (
        f"Does not fit: {room}. Lower max_batch_tokens, set performance.checkpoint_language_model, or share the "
        "model out (engine.kind fsdp2, more --ranks)."
    )


def _positive(kind: type[float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = 0
        if not 0 < number < float("inf"):
            raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
        return number

    return parse


def _share(text: str) -> float:
    number = _positive(float)(text)
    if number > 1:
        raise argparse.ArgumentTypeError(f"expected a share up to 1, got {text!r}")
    return number
