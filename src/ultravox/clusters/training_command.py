"""The training command inside a job's shell text: which config it runs, into which folder, and whether it resumes.

The tools that send jobs take any text for a command. What they cannot see is found here: a config that is not there or
does not load with the overrides beside it, a run that stays on a machine that goes away, a job that starts from nothing
whenever it is started again, and two tools that both start the processes.
"""

import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ultravox.config.load import load_config
from ultravox.errors import ConfigError

#: Ends one command of a shell line. Quoted ones are inside longer words by then.
_SEPARATORS = frozenset(("&&", "||", ";", "|", "&", "(", ")", "{", "}", "\n"))
_LAUNCHER = "launch/torchrun.sh"
_TORCHRUN = ("torchrun", "torch.distributed.run")


@dataclass(frozen=True)
class TrainingCall:
    """One `… ultravox train CONFIG …` of a shell text."""

    launcher: tuple[str, ...]
    """The words before it: `python -m`, `torchrun …`, `srun bash launch/torchrun.sh`."""

    config: str | None
    """The file; None where there is no word for it."""

    words: tuple[str, ...]
    """What follows the config."""

    @property
    def through_script(self) -> bool:
        """Whether `launch/torchrun.sh` makes the call: it chooses the run's folder and looks for checkpoints itself."""
        return any(word.endswith(_LAUNCHER) for word in self.launcher)

    @property
    def torchrun(self) -> bool:
        """Whether torchrun starts the processes."""
        return self.through_script or any(word.endswith(_TORCHRUN) for word in self.launcher)

    @property
    def overrides(self) -> list[str]:
        """The `--key value` words that can be judged here: not the command's own options, nor what a variable holds."""
        kept: list[str] = []
        for word in self.words:
            if not _is_variable(word):
                kept.append(word)
            elif kept and kept[-1].startswith("--") and "=" not in kept[-1]:
                kept.pop()  # the key goes with its value
        return [word for word in kept if word not in ("--resume", "--overwrite")]


def find_training_calls(text: str) -> list[TrainingCall]:
    """Every training call of a shell text, in order.

    Raises:
        ValueError: a quote is never closed.
    """
    return [call for words in _commands(text) if (call := _as_call(words)) is not None]


def find_mistakes(
    text: str,
    root: Path,
    *,
    resumes: bool = True,
    processes_of: Callable[[TrainingCall], int | None] = lambda call: None,
) -> list[str]:
    """What is wrong with a job's shell text, a line each; empty when it will do.

    Args:
        text: of the shell, AzureML's ``${{…}}`` and shell variables included.
        root: the folder that the text runs in, where its configs are.
        resumes: whether the job must go on from its checkpoints when it starts again.
        processes_of: how many processes share a call's run; None = that cannot be told.
    """
    try:
        calls = find_training_calls(text)
    except ValueError as error:
        return [f"the command is no shell text ({error})"]
    if not calls:
        return ["the command runs no `ultravox train CONFIG`: write `python -m ultravox train configs/….yaml …`"]
    mistakes: list[str] = []
    for call in calls:
        mistakes += _config_mistakes(call, root, processes_of(call))
        if call.through_script:
            continue
        if not _has_option(call.words, "run_dir"):
            mistakes.append(
                "the training has no --run_dir: its checkpoints would go with the machine; name a folder that stays"
            )
        if "--resume" in call.words:
            mistakes.append(
                "--resume stands there in any case, but a first start has no checkpoint to go on from: look for "
                "checkpoints first, as azureml/configs/audiollm.yml does"
            )
        elif resumes and not _looks_for_checkpoints(text):
            mistakes.append(
                "the command never passes --resume: a job that starts again would not go on from its checkpoints; "
                "look for them first, as azureml/configs/audiollm.yml does"
            )
    return mistakes


def _config_mistakes(call: TrainingCall, root: Path, num_processes: int | None) -> Iterator[str]:
    if call.config is None or call.config.startswith("-"):
        yield f"`ultravox train` names no config before {call.config or 'its end'}: write `ultravox train CONFIG …`"
        return
    if _is_variable(call.config):
        return
    path = root / call.config
    if not path.is_file():
        yield f"the command trains {call.config}, which is not in {root}: the job has only what is in its code folder"
        return
    try:
        stages = load_config(path, call.overrides).stages
    except ConfigError as error:
        yield f"the command's config does not load: {error.mistakes[0]}"
        return
    for stage in stages:
        if num_processes is not None and stage.accumulation_steps % num_processes:
            yield (
                f"stages.{stage.name}.accumulation_steps is {stage.accumulation_steps}, over all of the job's "
                f"{num_processes} processes: it must be a multiple of their number; pass "
                f"--stages.{stage.name}.accumulation_steps {_next_multiple(stage.accumulation_steps, num_processes)}"
            )


def _next_multiple(number: int, divisor: int) -> int:
    return -(-number // divisor) * divisor


def _looks_for_checkpoints(text: str) -> bool:
    return "--resume" in text and "checkpoints/" in text


def _has_option(words: tuple[str, ...], name: str) -> bool:
    keys = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
    return name in keys


def _is_variable(word: str) -> bool:
    """A word that is one variable: what it holds is known when the shell runs. (``${{…}}`` is AzureML's.)"""
    return re.fullmatch(r"\$(\w+|@|\{[^{}]+\})", word) is not None


def _commands(text: str) -> Iterator[list[str]]:
    """The words of each simple command; quotes and comments are the shell's."""
    text = re.sub(r"\\\n", " ", text)
    words: list[str] = []
    for line in text.splitlines():
        lexer = shlex.shlex(_shield(line), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        for word in map(_unshield, [*lexer, "\n"]):
            if word in _SEPARATORS:
                if words:
                    yield words
                words = []
            else:
                words.append(word)


#: shlex takes the braces and brackets of ${{…}} and "${x[@]}" apart; these stand in for them meanwhile.
_SHIELDS = {"{": "\ue000", "}": "\ue001", "(": "\ue002", ")": "\ue003"}


def _shield(line: str) -> str:
    def replace(match: re.Match[str]) -> str:
        return "".join(_SHIELDS.get(letter, letter) for letter in match[0])

    return re.sub(r"\$\{\{.*?\}\}|\$\{[^{}]*\}|\$\([^()]*\)", replace, line)


def _unshield(word: str) -> str:
    for letter, shield in _SHIELDS.items():
        word = word.replace(shield, letter)
    return word


def _as_call(words: list[str]) -> TrainingCall | None:
    for index, word in enumerate(words):
        if word.endswith(_LAUNCHER):
            at = index + 1
        elif word.rpartition("/")[2] == "ultravox" and words[index + 1 : index + 2] == ["train"]:
            at = index + 2
        else:
            continue
        config = words[at] if at < len(words) else None
        return TrainingCall(tuple(words[: index + 1]), config, tuple(words[at + 1 :]))
    return None
