"""The ``ultravox`` command: finds the chosen command's file, parses its arguments, turns errors into one line.

Only the chosen command's module is imported, and it imports what is heavy inside ``run``: help comes at once.
A command module holds ``HELP: str``, ``add_arguments(parser)`` and ``run(args) -> int``. It may also hold
``TAKES_OVERRIDES = True``, to get every ``--key value`` that it does not know as ``args.overrides``, and
``epilog() -> str``, which ends its help.
"""

import argparse
import difflib
import errno
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib import import_module
from types import ModuleType
from typing import NoReturn

from ultravox import __version__
from ultravox.errors import ConfigError, UltravoxError
from ultravox.files import DISK_ERRORS

COMMANDS = {
    "train": "train a model as a config file says",
    "estimate": "what a run will take on each GPU: parameters, memory, time",
    "diagnose": "find out why a loss does not go down: eighteen checks of data, labels, model and optimizer",
    "evaluate": "measure a trained model on held-out speech, with controls and bounds, and write a report",
    "ask": "ask a model about recordings; the answer streams",
    "transcribe": "write down what is said in audio files",
    "chat": "talk with a model over several turns, with recordings in any of them",
    "models": "list the bundled models, or fetch some",
    "data": "fetch, look into and prepare training data",
    "checkpoint": "look into training checkpoints, verify or average them, make models of them",
    "azureml": "write and send AzureML jobs that train",
    "auth": "check the tokens and keys of other services",
}

#: Commands that are a group of actions, each with a file of its own in the folder of the command's name.
ACTIONS = {
    "data": {
        "list": "show the bundled datasets",
        "fetch": "fetch or make bundled datasets",
        "inspect": "what a dataset holds, and which rows to look at",
        "prepare": "check a dataset and pack it into Parquet shards to train from",
        "synthesize": "make a dataset of texts that synthetic voices speak",
        "audit": "whether each example comes as often as asked, in one order for any number of machines",
        "cache": "compute, look at or remove the cached features of frozen encoders",
    },
    "checkpoint": {
        "inspect": "what a run's checkpoints hold",
        "verify": "hold their files against their hashes",
        "average": "one model of several checkpoints",
        "convert": "the model of one checkpoint",
    },
    "azureml": {
        "render": "write a job file for a run's config",
        "submit": "check a job file and send it",
    },
    "auth": {
        "check": "which tokens and keys are set, and where they come from; never the values",
    },
}

#: Commands that may load a model or data from the Hugging Face hub, where it wants to know who asks. `train` looks for
#: all that its run needs itself.
FROM_HUB = frozenset(("estimate", "diagnose", "evaluate", "ask", "transcribe", "chat", "models")) | {
    *(f"data.{action}" for action in ACTIONS["data"] if action != "list"),
    "checkpoint.average",
    "checkpoint.convert",
}

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """argparse with the house's form of an error: one line, exit code 2."""

    def __init__(self, prog: str, make_epilog: Callable[[], str] | None = None, **kwargs) -> None:
        super().__init__(prog, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self.make_epilog = make_epilog

    def format_help(self) -> str:
        if self.make_epilog is not None:
            self.epilog = self.make_epilog()  # only now: it may take time
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_ERROR, f"ultravox: error: {message} (see {self.prog} --help)\n")


def entry() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name may be no text, and must not cost the output
    sys.exit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 when it went well, 2 when what the user gave cannot work, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help(), end="")
        return 0 if words else EXIT_ERROR
    if words[0] in ("-V", "--version"):
        print(f"ultravox {__version__}")
        return 0
    name = words[0]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"choose from {', '.join(COMMANDS)}"
        return _fail(f"unknown command '{name}'; {hint}")
    rest = words[1:]
    if name in ACTIONS:
        known = ACTIONS[name]
        if not rest or rest[0] in ("-h", "--help"):
            print(_group_help(name), end="")
            return 0 if rest else EXIT_ERROR
        action, *rest = rest
        if action not in known:
            close = difflib.get_close_matches(action, known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"choose from {', '.join(known)}"
            return _fail(f"unknown action '{name} {action}'; {hint}")
        name = f"{name}.{action}"
    try:
        return _run(name, rest)
    except SystemExit as stop:  # argparse has already said why
        return stop.code if isinstance(stop.code, int) else EXIT_ERROR
    except KeyboardInterrupt:
        print("\nultravox: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # the reader (head, less) has gone; point stdout elsewhere, or Python complains once more while it closes it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except Exception as error:
        message = explain(error)
        if message is None or os.environ.get("ULTRAVOX_TRACEBACK"):
            raise
        return _fail(message)


def explain(error: BaseException) -> str | None:
    """One line for an error that the user can mend; None for a fault of ours, which deserves its traceback.

    A configuration may have several mistakes: the others follow, a line each.
    """
    if isinstance(error, ConfigError):
        return "\n  ".join(" ".join(mistake.split()) for mistake in error.mistakes)
    if isinstance(error, UltravoxError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        place = f"{error.filename}: " if error.filename else ""
        return place + DISK_ERRORS[error.errno]
    if "No space left on device" in str(error):  # safetensors and torch raise errors of their own
        return DISK_ERRORS[errno.ENOSPC]
    return None


def build_parser(name: str) -> tuple[argparse.ArgumentParser, ModuleType]:
    """The parser of one command ("train", "data.list"), with its module; imports that module only."""
    module = import_module(f"ultravox.cli.{name}")
    parser = _Parser(f"ultravox {name.replace('.', ' ')}", getattr(module, "epilog", None), description=module.HELP)
    module.add_arguments(parser)
    return parser, module


def _run(name: str, words: list[str]) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns after every fork
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # our own line says that the hub was not reached
    parser, module = build_parser(name)
    overrides: list[str] = []
    if getattr(module, "TAKES_OVERRIDES", False):
        words, overrides = split_overrides(words, parser)
    args = parser.parse_args(words)
    args.overrides = overrides
    with ExitStack() as stack:
        if name in FROM_HUB:
            from ultravox.auth.credentials import exported, find_credentials, of_services

            stack.enter_context(exported(find_credentials(of_services("huggingface"))))
        return int(module.run(args) or 0)


def split_overrides(words: Sequence[str], parser: argparse.ArgumentParser) -> tuple[list[str], list[str]]:
    """Part ``--key value`` and ``--key=value`` that the parser does not know from the words that it does.

    argparse cannot: it would take the value of an unknown option for a positional argument.
    """
    known = set(parser._option_string_actions)
    mine: list[str] = []
    overrides: list[str] = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if not re.match(r"--[A-Za-z]", word) or word.partition("=")[0] in known:
            mine.append(word)
            continue
        # a misspelt option would swallow the next word as its value
        if "." not in word and (close := difflib.get_close_matches(word, known, n=1, cutoff=0.8)):
            parser.error(f"unknown option {word}; did you mean {close[0]}?")
        overrides.append(word)
        if "=" not in word and queue and not re.match(r"--[A-Za-z]", queue[0]):
            overrides.append(queue.pop(0))
    return mine, overrides


def _help() -> str:
    return "\n".join(
        [
            "usage: ultravox COMMAND …",
            "",
            "Train, evaluate and talk to large language models that hear.",
            "",
            "commands:",
            *_columns(COMMANDS),
            "",
            "ultravox COMMAND --help explains one command; ultravox --version prints the version.",
            "",
        ]
    )


def _group_help(name: str) -> str:
    return "\n".join(
        [
            f"usage: ultravox {name} ACTION …",
            "",
            f"{COMMANDS[name].capitalize()}.",
            "",
            "actions:",
            *_columns(ACTIONS[name]),
            "",
            f"ultravox {name} ACTION --help explains one action.",
            "",
        ]
    )


def _columns(texts: dict[str, str]) -> list[str]:
    width = max(map(len, texts)) + 2
    return [f"  {name:<{width}}{text}" for name, text in texts.items()]


def _fail(message: str) -> int:
    print(f"ultravox: error: {message}", file=sys.stderr)
    return EXIT_ERROR
