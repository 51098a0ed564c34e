"""Bundled datasets, whole: what the data layer makes, with the answers that a language model gives."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ultravox.inference.text import TextResponder

REQUESTS = "spoken-requests-en"
DEFAULT_LANGUAGE_MODEL = "smollm2-135m-instruct"
DEFAULT_CHAT_TEMPLATE = "chatml.jinja"
# raise it when the way of answering changes: answers of another version are made anew
ANSWER_VERSION = 1


def fetch_dataset(
    name: str,
    minutes: float | None = None,
    language_model: str = DEFAULT_LANGUAGE_MODEL,
    chat_template: str = DEFAULT_CHAT_TEMPLATE,
) -> Path:
    """The folder of a bundled dataset, made on first use.

    Args:
        name: one of the bundled names.
        minutes: of speech in ``synthetic-en``; None = its default.
        language_model: who answers the requests of ``spoken-requests-en``.
        chat_template: the template of the run that will train on those answers.
    """
    from ultravox.data import bundled

    folder = bundled.fetch_dataset(name) if minutes is None else bundled.fetch_dataset(name, minutes)
    if name == REQUESTS:
        add_own_answers(folder, language_model, chat_template)
    return folder


def add_own_answers(folder: Path, language_model: str, chat_template: str) -> None:
    """Have the language model answer the texts of a dataset, unless these are its answers already."""
    from ultravox.data.synthesize import add_answers

    add_answers(folder, text_answers(language_model, chat_template), answered_by(language_model, chat_template))


def answered_by(language_model: str, chat_template: str) -> str:
    """The name under which a language model's answers are kept: all that they depend on."""
    return f"{language_model}, {chat_template}, version {ANSWER_VERSION}"


def text_answers(language_model: str, chat_template: str) -> Callable[[Sequence[str]], list[str]]:
    """Texts to what the language model says to each; it is loaded when the first ones come."""

    @cache
    def responder() -> "TextResponder":
        from ultravox.inference.text import TextResponder
        from ultravox.model.factory import load_language_model, load_tokenizer

        return TextResponder(load_language_model(language_model), load_tokenizer(language_model, chat_template))

    def answer(texts: Sequence[str]) -> list[str]:
        from ultravox.packages import working

        with working(f"{language_model} answers {len(texts)} requests"):
            return responder()(texts)

    return answer
