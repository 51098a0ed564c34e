"""``ultravox data synthesize``: texts to speech to a dataset."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ultravox.cli.datasets import DEFAULT_CHAT_TEMPLATE
from ultravox.cli.names import hours
from ultravox.errors import UltravoxError

if TYPE_CHECKING:
    from ultravox.data.endpoints import Endpoint
    from ultravox.data.speech_dataset import Recipe
    from ultravox.data.splits import HeldoutFilter
    from ultravox.data.texts.items import TextSource

HELP = (
    "Make a dataset of texts that synthetic voices speak. The texts come from a file, from templates or from a "
    "language model; each row says where text and voice come from. Killed in the middle, the same command goes on."
)
DEFAULT_VOICE = "piper-joe"
NOT_STATED = "not stated"
LIMITS = {  # option → least, most
    "num_texts": (1, 10_000_000),
    "readings": (1, 10_000),
    "workers": (1, 1024),
    "max_characters": (1, 100_000),
    "max_seconds": (0.1, 600),
    "max_quarantine_share": (0, 1),
}


def epilog() -> str:
    """Examples."""
    return "\n".join(
        [
            "examples:",
            "  ultravox data synthesize lines.txt --output data/lines --voice piper-joe --voice hibari-heart",
            "  ultravox data synthesize requests.jsonl --output data/requests --answers smollm2-135m-instruct",
            "  ultravox data synthesize --template 'Please call {{ name }} at {{ number }}.' --values values.yaml \\",
            "    --num-texts 100 --speed 0.9 --speed 1.1 --readings 1 --output data/calls",
            "  ultravox data synthesize --writer smollm2-135m-instruct --num-texts 50 --topic tea --output data/tea",
            "  ultravox data synthesize --writer-url http://localhost:8000/v1 --writer-model NAME --num-texts 500 \\",
            "    --voice openai:alloy --speech-url http://localhost:8001/v1 --speech-model NAME --output data/served",
            "",
            "voices:",
            "  piper-joe, hibari-heart            bundled (CC0-1.0, Apache-2.0)",
            "  FILE.onnx, FILE.onnx:SPEAKER       any Piper model with its FILE.onnx.json beside it",
            "  espeak-ng:VOICE                    where the program espeak-ng is installed",
            "  openai:VOICE                       of the server of --speech-url",
        ]
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Texts, voices, answers, and where it all goes."""
    parser.add_argument("--output", metavar="FOLDER", type=Path, required=True, help="the dataset; its name is its own")
    parser.add_argument("--overwrite", action="store_true", help="remove a dataset that is there, and begin anew")
    _add_texts(parser.add_argument_group("texts (one of FILE, --template, --writer and --writer-url)"))
    _add_voices(parser.add_argument_group("speech"))
    group = parser.add_argument_group("answers")
    group.add_argument("--answers", metavar="MODEL", help="language model that answers the texts without an answer")
    group.add_argument(
        "--chat-template",
        metavar="NAME_OR_FILE",
        default=DEFAULT_CHAT_TEMPLATE,
        help="chat template of --answers and --writer; take that of the run to come (default: %(default)s)",
    )
    group = parser.add_argument_group("dataset")
    group.add_argument(
        "--licence", metavar="TEXT", default=NOT_STATED, help="of texts that state none (default: %(default)s)"
    )
    group.add_argument("--language", metavar="CODE", default="", help="of texts that state none, such as en")
    group.add_argument("--hold-out", action="store_true", help='put one text in five into a split "heldout"')
    group.add_argument("--seed", metavar="N", type=int, default=0, help="of all that is drawn (default: %(default)s)")
    group.add_argument("--workers", metavar="N", type=int, help="readings made at once (default: processor cores)")


def _add_texts(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "texts", metavar="FILE", type=Path, nargs="?", help=".txt: a text a line; .jsonl: rows with text"
    )
    group.add_argument("--template", metavar="TEXT", action="append", help="Jinja template; may be given again")
    group.add_argument("--values", metavar="FILE", type=Path, help="YAML: the lists that the templates name")
    group.add_argument("--writer", metavar="MODEL", help="language model that writes the texts here")
    group.add_argument(
        "--writer-url", metavar="URL", help="or a server with OpenAI's interface, as http://localhost:8000/v1"
    )
    group.add_argument("--writer-model", metavar="NAME", help="its model")
    group.add_argument("--writer-key-env", metavar="VARIABLE", default="", help="environment variable with its API key")
    group.add_argument("--topic", metavar="TEXT", default="", help="what the written texts are about")
    group.add_argument(
        "--instructions", metavar="TEXT", default="", help='in place of "Write one short sentence that somebody …"'
    )
    group.add_argument("--num-texts", metavar="N", type=int, help="how many (default: all; a writer needs a number)")
    group.add_argument(
        "--max-characters", metavar="N", type=int, default=400, help="longer texts are left out (default: %(default)s)"
    )
    group.add_argument(
        "--heldout",
        metavar="SOURCE",
        action="append",
        default=[],
        help='leave out texts that hold one of a dataset\'s split "heldout" or of a .jsonl file; may be given again',
    )


def _add_voices(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--voice", action="append", metavar="VOICE", help=f"see below; may be given again (default: {DEFAULT_VOICE})"
    )
    group.add_argument(
        "--speed", metavar="X", type=float, action="append", help="1.1 = faster; may be given again (default: 1)"
    )
    group.add_argument(
        "--readings", metavar="N", type=int, help="of each text, drawn among voices × speeds (default: all of them)"
    )
    group.add_argument("--voice-licence", metavar="TEXT", default=NOT_STATED, help="of a voice that is not bundled")
    group.add_argument("--speech-url", metavar="URL", help="server of openai: voices, as http://localhost:8000/v1")
    group.add_argument("--speech-model", metavar="NAME", help="its model")
    group.add_argument("--speech-key-env", metavar="VARIABLE", default="", help="environment variable with its API key")
    group.add_argument(
        "--max-seconds", metavar="X", type=float, default=30.0, help="longer speech is set aside (default: %(default)g)"
    )
    group.add_argument(
        "--max-quarantine-share",
        metavar="X",
        type=float,
        default=0.01,
        help="fail when more than this share of the readings is set aside (default: %(default)g)",
    )


def run(args: argparse.Namespace) -> int:
    """Make the dataset, and say what came out."""
    _check(args)
    from ultravox.cli.datasets import answered_by, text_answers
    from ultravox.data.speech_dataset import QUARANTINE, Answerer, make_speech_dataset

    source, recipe = _source(args), _recipe(args)
    answerer = args.answers and Answerer(
        answered_by(args.answers, args.chat_template), text_answers(args.answers, args.chat_template)
    )
    allowed = _heldout_filter(args.heldout)
    info = make_speech_dataset(
        args.output,
        source,
        recipe,
        allowed=allowed,
        answerer=answerer or None,
        workers=args.workers,
        overwrite=args.overwrite,
    )
    for split, entry in info["splits"].items():
        print(f"{args.output}: {split}, {entry['num_clips']} clips, {hours(entry['seconds'])}")
    set_aside = {"texts left out": info["texts_left_out"], "readings set aside": info["readings_quarantined"]}
    if found := ", ".join(f"{what}: {count}" for what, count in set_aside.items() if count):
        print(f"{args.output / QUARANTINE}: {found}")
    return 0


def _check(args: argparse.Namespace) -> None:
    """UltravoxError for options that do not go together, before anything is loaded."""
    sources = {
        "FILE": args.texts,
        "--template": args.template,
        "--writer": args.writer,
        "--writer-url": args.writer_url,
    }
    given = [name for name, value in sources.items() if value is not None]
    if len(given) != 1:
        raise UltravoxError(f"expected one of {', '.join(sources)}, got {' and '.join(given) or 'none'}")
    for option, wanted in (
        ("values", "--template"),
        ("writer_model", "--writer-url"),
        ("writer_key_env", "--writer-url"),
    ):
        if getattr(args, option) and given != [wanted]:
            raise UltravoxError(f"--{option.replace('_', '-')} is of use with {wanted} alone")
    if (args.topic or args.instructions) and given[0] not in ("--writer", "--writer-url"):
        raise UltravoxError("--topic and --instructions are of use with --writer or --writer-url alone")
    if given[0] in ("--writer", "--writer-url") and args.num_texts is None:
        raise UltravoxError(f"{given[0]} needs --num-texts: how many texts to write")
    for url, model in (("writer_url", "writer_model"), ("speech_url", "speech_model")):
        if bool(getattr(args, url)) != bool(getattr(args, model)):
            raise UltravoxError(f"--{url.replace('_', '-')} and --{model.replace('_', '-')} go together")
    for option, (least, most) in LIMITS.items():
        if (value := getattr(args, option)) is not None and not least <= value <= most:
            raise UltravoxError(f"--{option.replace('_', '-')} takes {least:g} to {most:g}, got {value:g}")
    for speed in args.speed or ():
        if not 0.25 <= speed <= 4:
            raise UltravoxError(f"--speed takes 0.25 to 4, got {speed:g}")


def _source(args: argparse.Namespace) -> "TextSource":
    if args.texts is not None:
        from ultravox.data.texts.items import FileTexts

        return FileTexts(args.texts)
    if args.template:
        from ultravox.data.texts.fill_templates import TemplateTexts, read_values

        values = read_values(args.values) if args.values else {}
        return TemplateTexts(args.template, values, sample=args.num_texts is not None, seed=args.seed)

    from ultravox.data.texts.writer import WrittenTexts

    wishes = (args.topic, args.instructions, args.language, args.seed)
    if args.writer:
        from ultravox.cli.datasets import text_answers

        answers = text_answers(args.writer, args.chat_template)
        return WrittenTexts(
            lambda prompts, seed: answers(prompts), args.writer, args.num_texts, *wishes, where=args.chat_template
        )
    endpoint = _endpoint(args.writer_url, args.writer_model, args.writer_key_env)

    def write(prompts: Sequence[str], seed: int) -> list[str]:
        from concurrent.futures import ThreadPoolExecutor

        from ultravox.data.speak import num_cores
        from ultravox.packages import working

        message = f"{args.writer_model} writes {len(prompts)} texts"
        with working(message), ThreadPoolExecutor(args.workers or num_cores()) as pool:
            return list(pool.map(endpoint.chat, prompts, range(seed, seed + len(prompts))))

    return WrittenTexts(write, args.writer_model, args.num_texts, *wishes, where=endpoint.url)


def _recipe(args: argparse.Namespace) -> "Recipe":
    from ultravox.data.casting import cast_voice
    from ultravox.data.speech_dataset import Recipe

    endpoint = _endpoint(args.speech_url, args.speech_model, args.speech_key_env) if args.speech_url else None
    names = list(dict.fromkeys(args.voice or [DEFAULT_VOICE]))
    return Recipe(
        voices=[cast_voice(name, args.voice_licence, endpoint) for name in names],
        speeds=list(dict.fromkeys(args.speed or [1.0])),
        readings=args.readings,
        num_texts=args.num_texts,
        seed=args.seed,
        max_characters=args.max_characters,
        max_seconds=args.max_seconds,
        max_quarantine_share=args.max_quarantine_share,
        licence=args.licence,
        language=args.language,
        hold_out=args.hold_out,
    )


def _endpoint(url: str, model: str, key_env: str) -> "Endpoint":
    from ultravox.data.endpoints import Endpoint

    return Endpoint(url, model, key_env)


def _heldout_filter(sources: Sequence[str]) -> "HeldoutFilter":
    from ultravox.data.sources import load_clips
    from ultravox.data.splits import HeldoutFilter

    return HeldoutFilter(clip.text for source in sources for clip in load_clips(source, "heldout"))
