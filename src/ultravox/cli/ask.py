"""``ultravox ask``: one question about recordings, the answer as it comes."""

import argparse
from pathlib import Path

HELP = "Ask a model about recordings; the answer streams."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, the recordings, the question, and how the answer is chosen."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="run folder or saved model folder")
    parser.add_argument(
        "--audio", metavar="FILE", nargs="+", type=Path, default=[], help="wav, flac, mp3, ogg, m4a or webm files"
    )
    parser.add_argument(
        "--prompt", default="", help="text after the recordings; without it the model answers what was said"
    )
    add_decoding_arguments(parser)


def add_decoding_arguments(parser: argparse.ArgumentParser) -> None:
    """What `ask` and `chat` share."""
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=256, help="longest answer (default 256)")
    parser.add_argument(
        "--temperature", metavar="T", type=float, default=0.0, help="0 = always the likeliest token (default)"
    )
    parser.add_argument(
        "--top-p", metavar="P", type=float, default=1.0, help="draw from this share of the distribution (default 1)"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=None, help="makes drawn answers repeatable")


def run(args: argparse.Namespace) -> int:
    """Look at the files first: a wrong one should not wait for the model."""
    from ultravox.audio.waveform import load_speech
    from ultravox.errors import UltravoxError
    from ultravox.model.folder import find_model_folder

    if not args.audio and not args.prompt:
        raise UltravoxError("nothing to ask: give --audio FILE, --prompt TEXT or both")
    find_model_folder(args.checkpoint)
    waveforms = [load_speech(path) for path in args.audio]

    from ultravox.inference.api import load

    pieces = load(args.checkpoint).ask(
        waveforms,
        args.prompt,
        stream=True,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
    )
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0
