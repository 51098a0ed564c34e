"""``ultravox evaluate``: error rates with intervals, controls and bounds, spoken questions, and a report to look at."""

import argparse
from pathlib import Path
from typing import Any

HELP = (
    "Measure a checkpoint on held-out speech: word and character error rate with intervals; silence and swapped audio "
    "as controls; the encoder's own recogniser and the transcript as text as bounds; spoken questions. Writes "
    "results.json, predictions.jsonl and report.html."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything but the checkpoint has a default, from the run's config where there is one."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run folder, its model/, or a saved model folder")
    parser.add_argument(
        "--data", metavar="NAME_OR_PATH", help="dataset, folder or .jsonl (default: the run's; else asterisk-en)"
    )
    parser.add_argument("--split", metavar="NAME", help="split of the dataset (default: the run's; else heldout)")
    parser.add_argument(
        "--questions",
        metavar="NAME_OR_PATH",
        help="dataset of spoken questions, or none (default: the run's; else none)",
    )
    parser.add_argument("--limit", metavar="N", type=_positive, help="at most N clips and N questions, evenly spread")
    parser.add_argument("--fast", action="store_true", help="a first look: 32 clips, 16 questions, no bounds")
    parser.add_argument(
        "--batch-size", metavar="N", type=_positive, help="clips decoded at once (default: the run's; else 16)"
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        help="folder for the results (default: the run folder; a part of it, other data: RUN/evaluations/NAME)",
    )


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return number


def run(args: argparse.Namespace) -> int:
    """Evaluate, write the report, print the figures."""
    from rich.console import Console

    from ultravox.evaluation.checkpoint import find_checkpoint

    checkpoint = find_checkpoint(args.checkpoint)  # before the imports that take seconds

    from ultravox.evaluation.report import write_report
    from ultravox.evaluation.runner import Settings, evaluate

    config = checkpoint.evaluation
    questions = args.questions or config.get("question_source")
    options = {
        key: config[key] for key in ("batch_size", "max_new_tokens", "question_split", "num_bootstrap") if key in config
    }
    if args.batch_size:
        options["batch_size"] = args.batch_size
    settings = Settings(
        **options, limit=args.limit, fast=args.fast, questions=None if questions in (None, "none") else questions
    )
    source = args.data or config.get("source", "asterisk-en")
    split = args.split or config.get("split", "heldout")
    console = Console()
    with _progress(console) as progress:
        results, folder = evaluate(
            args.checkpoint,
            source,
            split,
            settings=settings,
            output=args.output,
            progress=progress,
            command=_command(args),
        )
    report = write_report(folder, run=checkpoint.run)
    print_results(results, console)
    if results["left_out"]:
        missing = ", ".join(results["left_out"])
        console.print(f"partial: without {missing}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"results  {folder / 'results.json'}", highlight=False, soft_wrap=True)
    console.print(f"report   {report}", highlight=False, soft_wrap=True)
    return 0


def _command(args: argparse.Namespace) -> str:
    """The command line that gives this evaluation again."""
    import shlex

    words = ["ultravox", "evaluate", str(args.checkpoint)]
    for name in ("data", "split", "questions", "limit", "batch_size", "output"):
        if (value := getattr(args, name)) is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words + (["--fast"] if args.fast else []))


class _progress:
    """A context with one progress bar for each task; where there is no terminal, one line for each finished task."""

    def __init__(self, console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = [TextColumn("{task.description:<26}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
        self.console = console
        self.bars = Progress(*columns, console=console, disable=not console.is_terminal)
        self.tasks: dict[str, Any] = {}

    def __enter__(self):
        self.bars.start()
        return self.update

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def update(self, task: str, done: int, total: int) -> None:
        """Move a task's bar."""
        if task not in self.tasks:
            self.tasks[task] = self.bars.add_task(task, total=total)
        self.bars.update(self.tasks[task], completed=done, total=total)
        if not self.console.is_terminal and done == total:
            self.console.print(f"{task}: {total} done", highlight=False)


def print_results(results: dict[str, Any], console) -> None:
    """The figures as a table, each with its interval."""
    from rich.table import Table

    wer = results["wer"]
    table = Table(title=f"{wer['n']} clips, {wer['num_words']} words", title_justify="left")
    table.add_column("")
    table.add_column("value", justify="right")
    table.add_column("95% interval", justify="right")

    def row(label: str, score: dict[str, Any], key: str) -> None:
        value, ends = score[key], score["interval"]
        if value is None:
            table.add_row(label, "[dim]absent[/dim]", f"[dim]{_plain(score['absent'])}[/dim]")
        else:
            table.add_row(label, f"{value:.1%}", f"{ends[0]:.1%} to {ends[1]:.1%}")

    row("[bold]word error rate[/bold]", wer, "value")
    row("character error rate", results["cer"], "value")
    row("control: silence", results["controls"]["silence"], "wer")
    row("control: swapped audio", results["controls"]["swapped"], "wer")
    row("bound: Whisper's own decoder", results["bounds"]["cascade"], "wer")
    row("bound: transcript as text", results["bounds"]["text"], "wer")
    answers = results["answers"]
    row("spoken questions answered alike", answers, "share")
    if answers["share"] is not None:
        row("  with swapped audio", answers["swapped"], "share")
    console.print(table)
    use = results["audio_use"]
    colour = {"PASS": "green", "FAIL": "red"}.get(use["verdict"], "yellow")
    console.print(f"audio use: [{colour}]{use['verdict']}[/{colour}] ({_plain(use['reason'])})", highlight=False)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
