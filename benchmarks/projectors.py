"""What each projector and downsampling costs, and how far it comes in the same time.

    python benchmarks/projectors.py                                  # parameters, positions and speed: about a minute
    python benchmarks/projectors.py --align-seconds 90 --seeds 3     # also trains each: about an hour on two cores
    python benchmarks/projectors.py mlp conv --align-seconds 90      # some of them

The forms are `configs/quickstart.yaml` and the files of `configs/projectors/`. Speed is forward and backward of the
projector alone on random frames; each round takes each form once, in turn, and all rounds are one run. With
`--align-seconds`, the quickstart's stage `align` is trained with each form for as many steps as take that long (40
steps of each are timed before; where others were timed earlier, the default is timed again beside it, and their ratio
counts), and scored by the CTC word error rate on training-split clips that were kept out of
training. Figures are added to `benchmarks/results/projectors.json`, and the tables in `docs/projectors.md` are written
from it; what has been timed or trained is not done again.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ultravox.config.load import load_config
from ultravox.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "projectors.json"
PAGE = ROOT / "docs" / "projectors.md"
USED = "quickstart"
FORMS = {
    USED: ROOT / "configs" / "quickstart.yaml",
    **{path.stem: path for path in sorted((ROOT / "configs" / "projectors").glob("*.yaml"))},
}
CLIP_SECONDS = 6.0
FRAMES_PER_SECOND = 50
NUM_ROWS = 2681  # tokens of the quickstart's transcripts, which the CTC projectors score
PILOT_STEPS = 40
KEPT_OUT_CLIPS = 44
BEGIN, END = "<!-- projectors -->\n", "<!-- end of projectors -->\n"
STUDENT_T_95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78}  # two-sided, by degrees of freedom
VERSION = 1


def build(name: str) -> Any:
    """The form's projector between Whisper tiny.en and SmolLM2-135M, whose weights are not needed."""
    import torch
    from transformers import LlamaConfig, WhisperConfig

    from ultravox.model.configuration import UltravoxConfig
    from ultravox.model.factory import projector_settings
    from ultravox.model.kernels import use_fast_linears
    from ultravox.model.projector_factory import projector_from_config

    whisper = WhisperConfig(d_model=384, encoder_attention_heads=6, encoder_ffn_dim=1536)
    llama = LlamaConfig(hidden_size=576, num_attention_heads=9, num_key_value_heads=3)
    settings = projector_settings(load_config(FORMS[name]).model)
    config = UltravoxConfig(whisper, llama, num_projector_rows=NUM_ROWS, **settings)
    torch.manual_seed(0)
    projector = projector_from_config(config, whisper.d_model)
    projector.init_scale(0.1)
    use_fast_linears(projector)
    return projector.train()


def speed(names: list[str], rounds: int, audio_seconds: float) -> dict[str, dict[str, Any]]:
    """Parameters, positions per second of audio, and seconds of audio per second, of each form."""
    import torch

    from ultravox.model.ctc_projector import CtcProjector

    projectors = {name: build(name) for name in names}
    num_clips = max(1, round(audio_seconds / CLIP_SECONDS))
    frames = torch.randn(num_clips, int(CLIP_SECONDS * FRAMES_PER_SECOND), 384)
    lengths = torch.full((num_clips,), frames.shape[1])
    rates: dict[str, list[float]] = {name: [] for name in names}
    positions = {}
    table = (torch.randn(NUM_ROWS, 576),)
    rows = {name: table if isinstance(projector, CtcProjector) else () for name, projector in projectors.items()}
    for number in range(rounds + 1):
        for name, projector in projectors.items():
            projector.zero_grad(set_to_none=True)
            start = time.perf_counter()
            output, token_lengths = projector(frames, lengths, *rows[name])
            output.sum().backward()
            if number:  # the first one fetches memory and compiles kernels
                rates[name].append(num_clips * CLIP_SECONDS / (time.perf_counter() - start))
            positions[name] = int(token_lengths.sum()) / (num_clips * CLIP_SECONDS)
    return {
        name: {
            "parameters": sum(parameter.numel() for parameter in projectors[name].parameters()),
            "positions_per_second": positions[name],
            "audio_seconds_per_second": {
                "median": statistics.median(rates[name]),
                "least": min(rates[name]),
                "most": max(rates[name]),
                "n": rounds,
            },
            "threads": torch.get_num_threads(),
        }
        for name in names
    }


def train(name: str, seed: int, steps: int) -> dict[str, Any]:
    """Align in a process of its own: what train.json says of the stage."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ultravox", "train", str(FORMS[name]), "--run_dir", f"{folder}/run"]
        command += ["--seed", str(seed), "--stages.tune.max_steps", "0", "--stages.align.max_steps", str(steps)]
        command += ["--stages.align.optim.warmup_steps", str(min(50, steps // 10)), "--logging.tensorboard", "false"]
        command += ["--stages.align.evaluate_every", "0", "--evaluation.num_progress_clips", str(KEPT_OUT_CLIPS)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\nfailed with code {done.returncode}:\n{done.stderr[-2000:]}")
        stages = json.loads(Path(folder, "run", "train.json").read_text())["stages"]
    return next(stage for stage in stages if stage["name"] == "align")


def step_seconds(name: str) -> float:
    """Of some steps of training."""
    pilot = train(name, 0, PILOT_STEPS)
    return float(pilot["seconds"] - pilot["evaluation_seconds"]) / PILOT_STEPS


def time_steps(name: str, seconds: float, machine: float) -> dict[str, Any]:
    """How many steps take so many seconds on a machine so much slower than this one; no runs yet."""
    per_step = step_seconds(name) * machine
    return {
        "asked_seconds": seconds,
        "seconds_per_step": per_step,
        "steps": max(1, round(seconds / per_step)),
        "wer": [],
    }


def align(results: dict[str, Any], names: list[str], seconds: float, seeds: int) -> None:
    """Word error rate of each seed after as many steps as take so many seconds. First all are timed, side by side."""
    aligned = results["align"]
    untimed = [name for name in names if name not in aligned or aligned[name]["asked_seconds"] != seconds]
    known, machine = aligned.get(USED, {}), 1.0
    if untimed and USED not in untimed and known.get("asked_seconds") == seconds:
        machine = known["seconds_per_step"] / step_seconds(USED)  # the others were timed at another hour
    for name in untimed:
        aligned[name] = time_steps(name, seconds, machine)
        write(results)
    for name in names:
        for seed in range(len(aligned[name]["wer"]), seeds):
            aligned[name]["wer"].append(train(name, seed, aligned[name]["steps"])["final_wer"])
            write(results)
        print(f"{name}: WER {interval(aligned[name]['wer'])}", flush=True)


def interval(values: list[float]) -> str:
    """Mean in per cent and the half width of its 95% interval (Student's t)."""
    mean = f"{100 * statistics.fmean(values):.1f}%"
    if len(values) < 2:
        return mean
    half = STUDENT_T_95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean} ± {100 * half:.1f}"


def tables(results: dict[str, Any]) -> str:
    """What stands between the markers of the page."""
    lines = ["| `configs/` | parameters | positions a second | audio seconds per second (least to most) | n |"]
    lines += ["|---|---|---|---|---|"]
    for name in (name for name in FORMS if name in results["speed"]):
        one = results["speed"][name]
        rate = one["audio_seconds_per_second"]
        lines.append(
            f"| `{name}` | {one['parameters'] / 1e6:.2f} M | {one['positions_per_second']:g} | {rate['median']:,.0f} "
            f"({rate['least']:,.0f} to {rate['most']:,.0f}) | {rate['n']} |"
        )
    if results["align"]:
        lines += [
            "",
            "The stage `align` of the quickstart's data, each for about as long; greedy CTC decoding of clips that",
        ]
        lines += ["were kept out of training. WER: mean over the seeds with its 95% interval (Student's t)."]
        before = "Taken while the matching term of `align` was a mean over a batch's positions, not over each clip's."
        lines += [before, ""]
        lines += ["| `configs/` | WER | n seeds | steps | ms a step |", "|---|---|---|---|---|"]
        for name in (name for name in FORMS if results["align"].get(name, {}).get("wer")):
            one = results["align"][name]
            step = f"{1000 * one['seconds_per_step']:.0f}"
            lines.append(f"| `{name}` | {interval(one['wer'])} | {len(one['wer'])} | {one['steps']} | {step} |")
    return "\n".join(lines) + "\n"


def page(text: str, results: dict[str, Any]) -> str:
    """The page with the tables of these results."""
    before, found, rest = text.partition(BEGIN)
    _, also, after = rest.partition(END)
    if not (found and also):
        sys.exit(f"the page must hold the lines {BEGIN.strip()} and {END.strip()}")
    return f"{before}{BEGIN}\n{tables(results)}\n{END}{after}"


def write(results: dict[str, Any]) -> None:
    """Keep the results, and the page that is made from them."""
    atomic_write(RESULTS, json.dumps(results, indent=1) + "\n")
    atomic_write(PAGE, page(PAGE.read_text(), results))


def main() -> None:
    """Measure, and write what is found as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("forms", nargs="*", metavar="FORM", help=f"some of {', '.join(FORMS)}; none = all")
    parser.add_argument("--rounds", type=int, default=5, help="of measuring speed (default %(default)s)")
    parser.add_argument("--audio-seconds", type=float, default=120.0, help="of a batch (default %(default)s)")
    parser.add_argument("--align-seconds", type=float, default=0.0, help="also train each so long (default: not)")
    parser.add_argument("--seeds", type=int, default=3, help="of that training (default %(default)s)")
    arguments = parser.parse_args()
    if unknown := set(arguments.forms) - set(FORMS):
        parser.error(f"unknown form {', '.join(sorted(unknown))}; expected some of {', '.join(FORMS)}")
    if not 1 <= arguments.seeds <= max(STUDENT_T_95) + 1:
        parser.error(f"--seeds {arguments.seeds}: expected 1 to {max(STUDENT_T_95) + 1}")
    if arguments.rounds < 1 or arguments.audio_seconds <= 0 or arguments.align_seconds < 0:
        parser.error("--rounds, --audio-seconds: expected more than 0; --align-seconds: not less")
    names = arguments.forms or list(FORMS)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"version": VERSION, "speed": {}, "align": {}}
    if names == list(FORMS) or not set(results["speed"]) >= set(names):  # speeds of different runs do not compare
        results["speed"] = speed(list(FORMS), arguments.rounds, arguments.audio_seconds)
    write(results)
    print(tables(results), flush=True)
    if arguments.align_seconds:
        align(results, names, arguments.align_seconds, arguments.seeds)


if __name__ == "__main__":
    main()
