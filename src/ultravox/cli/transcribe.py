"""``ultravox transcribe``: what is said in audio files."""

import argparse
from pathlib import Path

HELP = "Write down what is said in audio files."
OUTPUT_VERSION = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, the files and the form of the output."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="run folder or saved model folder")
    parser.add_argument("files", metavar="FILE", nargs="+", type=Path, help="wav, flac, mp3, ogg, m4a or webm files")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object a line: version, file, seconds, text (default: plain text)"
    )
    parser.add_argument("--batch-size", metavar="N", type=int, default=8, help="files decoded together (default 8)")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=256, help="longest transcript (default 256)")


def run(args: argparse.Namespace) -> int:
    """Read every file first: a wrong one is named before the model is loaded."""
    import json

    from ultravox.audio.waveform import SAMPLE_RATE, load_waveform
    from ultravox.errors import UltravoxError

    if args.batch_size < 1:
        raise UltravoxError(f"--batch-size must be at least 1, got {args.batch_size}")
    waveforms = [load_waveform(path) for path in args.files]

    from ultravox.inference.api import load

    texts = load(args.checkpoint).transcribe(waveforms, batch_size=args.batch_size, max_new_tokens=args.max_new_tokens)
    for path, waveform, text in zip(args.files, waveforms, texts, strict=True):
        if args.json:
            seconds = round(len(waveform) / SAMPLE_RATE, 3)
            row = {"version": OUTPUT_VERSION, "file": str(path), "seconds": seconds, "text": text}
            print(json.dumps(row, ensure_ascii=False))
        else:
            print(text if len(texts) == 1 else f"{path}: {text}")
    return 0
