"""``ultravox transcribe``: what is said in audio files."""

import argparse
import sys
from pathlib import Path
from typing import Any

HELP = "Write down what is said in audio files."
OUTPUT_VERSION = 1
EXIT_SOME_FAILED = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, the files and the form of the output."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="run folder or saved model folder")
    parser.add_argument("files", metavar="FILE", nargs="+", type=Path, help="wav, flac, mp3, ogg, m4a or webm files")
    parser.add_argument(
        "--json",
        action="store_true",
        help="one JSON object a line: version, file, seconds, text; error instead of the last two where a file cannot "
        "be used (default: plain text)",
    )
    parser.add_argument("--batch-size", metavar="N", type=int, default=8, help="files decoded together (default 8)")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=256, help="longest transcript (default 256)")


def run(args: argparse.Namespace) -> int:
    """Read every file first: a wrong one is named before the model is loaded, and the others are still written down."""
    from ultravox.audio.waveform import load_speech
    from ultravox.errors import AudioError, UltravoxError
    from ultravox.model.folder import find_model_folder

    if args.batch_size < 1:
        raise UltravoxError(f"--batch-size must be at least 1, got {args.batch_size}")
    find_model_folder(args.checkpoint)
    found: dict[int, Any] = {}
    errors: dict[int, str] = {}
    for index, path in enumerate(args.files):
        try:
            found[index] = load_speech(path)
        except AudioError as error:
            errors[index] = " ".join(str(error).split())
            print(f"ultravox: error: {errors[index]}", file=sys.stderr)
    texts = dict(zip(found, _transcribe(args, list(found.values())), strict=True)) if found else {}
    for index, path in enumerate(args.files):
        if args.json:
            print(_row(path, found.get(index), texts.get(index), errors.get(index)))
        elif index in texts:
            print(texts[index] if len(args.files) == 1 else f"{path}: {texts[index]}")
    if errors and found:
        print(f"ultravox: {len(errors)} of {len(args.files)} files could not be used", file=sys.stderr)
    return EXIT_SOME_FAILED if errors else 0


def _transcribe(args: argparse.Namespace, waveforms: list[Any]) -> list[str]:
    from rich.console import Console
    from rich.progress import Progress

    from ultravox.inference.api import load

    model = load(args.checkpoint)
    console = Console(stderr=True)
    is_long = len(waveforms) > args.batch_size
    with Progress(console=console, transient=True, disable=not (console.is_terminal and is_long)) as progress:
        task = progress.add_task("transcribing", total=len(waveforms))
        return model.transcribe(
            waveforms,
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
            on_progress=lambda done: progress.update(task, completed=done),
        )


def _row(path: Path, waveform: Any, text: str | None, error: str | None) -> str:
    import json

    from ultravox.audio.waveform import SAMPLE_RATE

    row: dict[str, Any] = {"version": OUTPUT_VERSION, "file": str(path)}
    row |= {"error": error} if error else {"seconds": round(len(waveform) / SAMPLE_RATE, 3), "text": text}
    return json.dumps(row, ensure_ascii=False)
