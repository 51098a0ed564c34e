"""Write the README's numbers from the runs that made them.

    python benchmarks/readme.py runs/quickstart [runs/asterisk-long]

Each table row comes from the `results.json` and `train.json` of a run on this machine; nothing is typed by hand. The
numbers are also kept in `benchmarks/results/`, where the README can be made from again without the runs.
"""

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- numbers: written by benchmarks/readme.py -->", "<!-- end of numbers -->"


def summary(run: Path) -> dict[str, Any]:
    """What the README says about one run."""
    results = json.loads((run / "results.json").read_text())
    train = json.loads((run / "train.json").read_text())
    kept = {key: results[key] for key in ("wer", "cer", "controls", "bounds", "answers") if key in results}
    kept["train"] = {key: train[key] for key in ("train_seconds", "peak_memory_bytes", "stages")}
    return kept


def rate(score: dict[str, Any], key: str = "wer") -> str:
    """A rate with its interval; a score that was not measured stays without a number."""
    if score.get(key) is None:
        return "absent"
    low, high = score["interval"]
    return f"{100 * score[key]:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"


def table(runs: dict[str, dict[str, Any]]) -> str:
    """Rows of figures, a column for each run."""

    def stage(run: dict[str, Any], name: str, key: str) -> float:
        return next((stage[key] for stage in run["train"]["stages"] if stage["objective"] == name), float("nan"))

    rows = [
        ("**Word error rate**, held-out human speech", lambda run: f"**{rate(run['wer'], 'value')}**"),
        ("Character error rate", lambda run: rate(run["cer"], "value")),
        ("Control: silence instead of the audio, WER", lambda run: rate(run["controls"]["silence"])),
        ("Control: another clip's audio, WER", lambda run: rate(run["controls"]["swapped"])),
        ("Bound: Whisper's own decoder, WER", lambda run: rate(run["bounds"]["cascade"])),
        ("Bound: the transcript given as text, WER", lambda run: rate(run["bounds"]["text"])),
        ("Spoken questions answered as the LLM answers their text", lambda run: rate(run["answers"], "share")),
        ("The same with another question's audio", lambda run: rate(run["answers"]["swapped"], "share")),
        ("Bound: the same with the question as text", lambda run: rate(run["answers"]["text"], "share")),
        ("Training time, encoding included", lambda run: f"{run['train']['train_seconds'] / 60:.1f} min"),
        ("Peak memory of training", lambda run: f"{run['train']['peak_memory_bytes'] / 1e9:.1f} GB"),
        ("Alignment, audio seconds per second", lambda run: f"{stage(run, 'align', 'audio_seconds_per_second'):.0f}"),
        ("Tuning, tokens per second", lambda run: f"{stage(run, 'tune', 'tokens_per_second'):.0f}"),
        ("Tuning, share of the fp32 matmul rate", lambda run: f"{100 * stage(run, 'tune', 'matmul_utilisation'):.0f}%"),
    ]
    first = next(iter(runs.values()))
    words, clips = first["wer"]["num_words"], first["wer"]["n"]
    lines = [f"Held out: {clips} clips, {words} words; 95% bootstrap intervals in brackets; two CPU cores.", ""]
    lines += ["| | " + " | ".join(f"`{name}`" for name in runs) + " |", "|---" * (len(runs) + 1) + "|"]
    lines += [f"| {label} | " + " | ".join(cell(run) for run in runs.values()) + " |" for label, cell in rows]
    lines += [
        "",
        f"Answered as the LLM answers the text ({first['answers']['n']} questions): {first['answers']['rule']}",
    ]
    return "\n".join(lines)


def main() -> None:
    """Keep the runs' figures, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="evaluated run folders; none = the kept ones")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="default: the repository's")
    parser.add_argument("--kept", type=Path, default=ROOT / "benchmarks" / "results", help="folder of kept figures")
    arguments = parser.parse_args()
    readme, kept = arguments.readme, arguments.kept
    kept.mkdir(parents=True, exist_ok=True)
    for run in arguments.runs:
        (kept / f"{run.name}.json").write_text(json.dumps(summary(run), indent=1) + "\n")
    names = [name for name in ("quickstart", "asterisk-long") if (kept / f"{name}.json").is_file()]
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    runs = {name: json.loads((kept / f"{name}.json").read_text()) for name in names}
    readme.write_text(f"{before}{BEGIN}\n{table(runs)}\n{END}{after}")


if __name__ == "__main__":
    main()
