"""Write the README's numbers from the runs that made them.

    python benchmarks/readme.py runs/quickstart [runs/asterisk-long]

Each table row comes from the `results.json` and `train.json` of a run on this machine; nothing is typed by hand. The
numbers are also kept in `benchmarks/results/`, where the README can be made from again without the runs.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- numbers: written by benchmarks/readme.py -->", "<!-- end of numbers -->"
SHOWN = ("quickstart", "asterisk-long")  # names of run folders, in the order of the columns
ABSENT = "absent"


class NotShowable(Exception):
    """What keeps a run, or its kept figures, from the README: one sentence."""


def summary(run: Path, allow_partial: bool = False) -> dict[str, Any]:
    """What the README says about one run."""
    for name in ("results.json", "train.json"):
        if not (run / name).is_file():
            raise NotShowable(f"{run} has no {name}: train it, and run `ultravox evaluate {run}`")
    results = json.loads((run / "results.json").read_text())
    train = json.loads((run / "train.json").read_text())
    is_older = "left_out" not in results
    left_out = ["some of it"] if is_older and (results["fast"] or results["data"]["limit"]) else results.get("left_out")
    if left_out and not allow_partial:
        raise NotShowable(f"{run}/results.json was measured without {', '.join(left_out)}: evaluate the whole")
    keys = ("wer", "cer", "controls", "bounds", "answers", "generation", "evaluation_peak_memory_bytes")
    kept = {key: results[key] for key in keys if key in results}
    kept["train"] = {key: train[key] for key in ("train_seconds", "peak_memory_bytes", "num_threads")}
    kept["train"]["stages"] = [
        {key: value for key, value in stage.items() if key != "left_out"} for stage in train["stages"]
    ]
    if (run / "whole.json").is_file():  # of benchmarks/quickstart.py
        kept["whole_seconds"] = json.loads((run / "whole.json").read_text())["seconds"]
    return kept


def load_kept(folder: Path) -> dict[str, dict[str, Any]]:
    """The kept figures by the run's name."""
    files = {name: folder / f"{name}.json" for name in SHOWN}
    runs = {name: json.loads(path.read_text()) for name, path in files.items() if path.is_file()}
    if not runs:
        raise NotShowable(f"{folder} keeps no run's figures: name the run folders")
    for name, run in runs.items():
        if "num_threads" not in run["train"] or "transcript_limit" not in run.get("generation", {}):
            raise NotShowable(f"{files[name]} is of an older form: train and evaluate {name} again")
    if len({(run["wer"]["n"], run["wer"]["num_words"]) for run in runs.values()}) > 1:
        raise NotShowable(f"{' and '.join(runs)} were measured on different clips: evaluate both on the same")
    return runs


def rate(score: dict[str, Any] | None, key: str = "wer") -> str:
    """A rate with its interval; a score that was not measured stays without a number."""
    if not score or score.get(key) is None:
        return ABSENT
    low, high = score["interval"]
    return f"{100 * score[key]:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"


def gigabytes(number: float | None) -> str:
    """Bytes as GB, where they were measured."""
    return ABSENT if number is None else f"{number / 1e9:.1f} GB"


def table(runs: dict[str, dict[str, Any]]) -> str:
    """Rows of figures, a column for each run; a row that no run has is left out."""

    def stage(name: str, key: str, form: str, scale: float = 1) -> Callable[[dict[str, Any]], str]:
        def cell(run: dict[str, Any]) -> str:
            found = [stage[key] for stage in run["train"]["stages"] if stage["objective"] == name and key in stage]
            return form.format(scale * found[0]) if found else ABSENT

        return cell

    def percent(key: str) -> Callable[[dict[str, Any]], str]:
        return stage("tune", key, "{:.1f}%", 100)

    def asked(kind: str) -> Callable[[dict[str, Any]], str]:
        return lambda run: rate(run.get("answers", {}).get(kind), "share")

    def whole(run: dict[str, Any]) -> str:
        return f"{run['whole_seconds'] / 60:.1f} min" if "whole_seconds" in run else ABSENT

    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("**Word error rate**, held-out human speech", lambda run: f"**{rate(run['wer'], 'value')}**"),
        ("Character error rate", lambda run: rate(run["cer"], "value")),
        ("Control: silence instead of the audio, WER", lambda run: rate(run["controls"]["silence"])),
        ("Control: another clip's audio, WER", lambda run: rate(run["controls"]["swapped"])),
        ("Bound: Whisper's own decoder, WER", lambda run: rate(run["bounds"]["cascade"])),
        ("Bound: the transcript given as text, WER", lambda run: rate(run["bounds"]["text"])),
        ("Spoken questions answered as the LLM answers their text", lambda run: rate(run.get("answers"), "share")),
        ("The same with another question's audio", asked("swapped")),
        ("Bound: the same with the question as text", asked("text")),
        ("Whole command on a fresh clone: set-up, downloads, training, evaluation", whole),
        ("Training time, encoding included", lambda run: f"{run['train']['train_seconds'] / 60:.1f} min"),
        ("CPU threads of training", lambda run: str(run["train"]["num_threads"])),
        ("Peak memory of training", lambda run: gigabytes(run["train"]["peak_memory_bytes"])),
        ("Peak memory of evaluation", lambda run: gigabytes(run.get("evaluation_peak_memory_bytes"))),
        ("Alignment, audio seconds per second", stage("align", "audio_seconds_per_second", "{:.0f}")),
        ("Tuning, tokens per second", stage("tune", "tokens_per_second", "{:.0f}")),
        (
            "Tuning, share of the fp32 matmul rate of the same minutes",
            stage("tune", "utilisation_of_usual", "{:.1f}%", 100),
        ),
        ("Tuning, share of the best fp32 matmul rate", stage("tune", "matmul_utilisation", "{:.1f}%", 100)),
    ]
    first = next(iter(runs.values()))
    words, clips = first["wer"]["num_words"], first["wer"]["n"]
    lines = [f"Held out: {clips} clips, {words} words; 95% bootstrap intervals in brackets.", ""]
    lines += ["| | " + " | ".join(f"`{name}`" for name in runs) + " |", "|---" * (len(runs) + 1) + "|"]
    for label, cell in rows:
        cells = [cell(run) for run in runs.values()]
        if set(cells) != {ABSENT}:
            lines.append(f"| {label} | {' | '.join(cells)} |")
    if limit := first["generation"]["transcript_limit"]:
        lines += [
            "",
            f"The model's transcripts, those of the controls too, are cut at {limit['extra_tokens']} + "
            f"{limit['tokens_per_second']:g} tokens a second of audio, which bounds their insertions"
            f"{repetition(limit)}.",
        ]
    for answers in [run["answers"] for run in runs.values() if run.get("answers", {}).get("share") is not None][:1]:
        lines += ["", f"Answered as the LLM answers the text ({answers['n']} questions): {answers['rule']}"]
    return "\n".join(lines)


def repetition(limit: dict[str, Any]) -> str:
    """What else cuts transcripts, in runs that were measured since it does."""
    if "min_repeated_tokens" not in limit:
        return ""
    return (
        f", and end where they say the same {limit['min_times']} times in a row, over {limit['min_repeated_tokens']} "
        f"tokens or more"
    )


def with_table(readme: str, runs: dict[str, dict[str, Any]]) -> str:
    """The README's text with a new table between its two markers."""
    before, after = around_table(readme)
    return f"{before}{BEGIN}\n{table(runs)}\n{END}{after}"


def around_table(readme: str) -> tuple[str, str]:
    """What stands before and after the two markers."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise NotShowable(f"the README must hold the two lines {BEGIN} and {END}, in this order")
    return before, after


def main() -> None:
    """Keep the runs' figures, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="evaluated run folders; none = the kept ones")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="default: the repository's")
    parser.add_argument("--kept", type=Path, default=ROOT / "benchmarks" / "results", help="folder of kept figures")
    parser.add_argument("--allow-partial", action="store_true", help="also show runs measured with --limit or --fast")
    arguments = parser.parse_args()
    readme, kept = arguments.readme, arguments.kept
    if unknown := [run.name for run in arguments.runs if run.name not in SHOWN]:
        parser.error(f"the README shows the runs {' and '.join(SHOWN)}, not {', '.join(unknown)}")
    try:
        around_table(readme.read_text())  # before anything is kept
        for run in arguments.runs:
            figures = summary(run, arguments.allow_partial)
            kept.mkdir(parents=True, exist_ok=True)
            (kept / f"{run.name}.json").write_text(json.dumps(figures, indent=1) + "\n")
        readme.write_text(with_table(readme.read_text(), load_kept(kept)))
    except NotShowable as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
