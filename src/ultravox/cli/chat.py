"""``ultravox chat``: a conversation in the terminal."""

import argparse
import sys
from pathlib import Path
from typing import Any

HELP = "Talk with a model over several turns, with recordings in any of them."
COMMANDS = """/audio FILE   add a recording to the next message; Enter sends it alone
/reset        forget the conversation
/help         show this
/quit         leave (so does Ctrl-D)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, a system message, and how answers are chosen."""
    from ultravox.cli.ask import add_decoding_arguments

    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="run folder or saved model folder")
    parser.add_argument("--system", default=None, help="a system message to begin with")
    add_decoding_arguments(parser)


def epilog() -> str:
    """The commands inside the conversation."""
    return f"in the conversation:\n{COMMANDS}"


def run(args: argparse.Namespace) -> int:
    """Read lines until the end. A wrong file ends a script, but not a person's conversation."""
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() a history and keys

    from ultravox.errors import UltravoxError
    from ultravox.model.folder import find_model_folder

    find_model_folder(args.checkpoint)  # before the imports that take seconds

    from ultravox.inference.api import load
    from ultravox.inference.generate import Decoding

    decoding = Decoding(args.max_new_tokens, args.temperature, args.top_p, args.seed)
    is_person = sys.stdin.isatty()
    chat = Chat(load(args.checkpoint).conversation(system=args.system, decoding=decoding))
    if is_person:
        print(COMMANDS)
    while True:
        try:
            line = input("> " if is_person else "")
        except EOFError:
            if chat.waveforms:
                chat.send("")
            return 0
        try:
            if not chat.handle(line.strip()):
                return 0
        except UltravoxError as error:
            if not is_person:
                raise
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            if not is_person:
                raise
            print()


class Chat:
    """What each line does."""

    def __init__(self, conversation: Any):
        self.conversation = conversation
        self.waveforms: list[Any] = []

    def handle(self, line: str) -> bool:
        """Do what one line says; False to leave."""
        from ultravox.errors import UltravoxError

        command, _, rest = line.partition(" ")
        if command in ("/quit", "/exit"):
            return False
        if command == "/help":
            print(COMMANDS)
        elif command == "/reset":
            self.conversation.reset()
            self.waveforms = []
        elif command == "/audio":
            self.add_audio(rest)
        elif command.startswith("/"):
            raise UltravoxError(f"unknown command {command}: expected /audio, /reset, /help or /quit")
        elif line or self.waveforms:
            self.send(line)
        return True

    def add_audio(self, path: str) -> None:
        """Keep a recording for the next message."""
        from ultravox.audio.waveform import SAMPLE_RATE, load_speech

        path = path.strip().strip("'\"")
        waveform = load_speech(path)
        self.waveforms.append(waveform)
        print(f"({path}: {len(waveform) / SAMPLE_RATE:.1f} s)", file=sys.stderr)

    def send(self, text: str) -> None:
        """Say it and print the answer as it comes."""
        answer = self.conversation.say(text, self.waveforms)
        self.waveforms = []  # only now: what say() refuses can be said again in other words
        try:
            for piece in answer:
                print(piece, end="", flush=True)
        finally:
            answer.close()  # after Ctrl-C, what was said so far stays in the conversation
            print()
