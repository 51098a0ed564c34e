"""The conversations that training and inference share, so that a model meets the prompts that it was trained on."""

import re
from functools import lru_cache
from typing import Any

from ultravox.errors import DataError
from ultravox.tokens import AUDIO_TOKEN

TRANSCRIBE_PROMPT = "Transcribe"

Message = dict[str, str]


def user_message(text: str = "", num_clips: int = 1) -> Message:
    """A user's turn: its clips first, then its text, as vLLM orders them too. Placeholders in `text` count as clips."""
    missing = max(0, num_clips - text.count(AUDIO_TOKEN))
    return {"role": "user", "content": AUDIO_TOKEN * missing + text}


def render_prompt(tokenizer: Any, messages: list[Message]) -> str:
    """The dialogue as text, up to where the assistant begins to write."""
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def render(tokenizer: Any, messages: list[Message]) -> tuple[list[int], list[bool]]:
    """Token ids of a dialogue, and where the assistant speaks: its words and its end token, in each of its turns.

    Raises:
        DataError: a chat template that rewrites earlier turns, or a dialogue without an assistant.
    """
    return encode_stretches(tokenizer, stretches(tokenizer, messages))


Stretch = tuple[str, bool]


def encode_stretches(tokenizer: Any, dialogue: list[Stretch]) -> tuple[list[int], list[bool]]:
    """`render`, from the texts of `stretches`."""
    ids: list[int] = []
    supervised: list[bool] = []
    for text, is_answer in dialogue:
        tokens = encode_all(tokenizer, [text])[0] if is_answer else prompt_tokens(tokenizer, len(tokenizer), text)
        ids += tokens
        supervised += [is_answer] * len(tokens)
    return ids, supervised


def encode_all(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of each text as it stands, without marks of a beginning or an end."""
    options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    return tokenizer(texts, **options)["input_ids"] if texts else []


@lru_cache(maxsize=8192)
def prompt_tokens(tokenizer: Any, num_entries: int, text: str) -> tuple[int, ...]:
    """Token ids of what the user says, which many rows have in common. `num_entries` is the tokenizer's length."""
    return tuple(encode_all(tokenizer, [text])[0])


def stretches(tokenizer: Any, messages: list[Message]) -> list[Stretch]:
    """A dialogue as the texts that are tokenised each by itself, and whether the assistant says it.

    Each is tokenised by itself, as it is in inference: the prompt's last letters never merge with the answer's first
    ones. The chat template runs once for all dialogues with the same roles; what the turns say is then put in.

    Raises:
        DataError: a chat template that rewrites earlier turns, or a dialogue without an assistant.
    """
    contents = [message["content"] for message in messages]
    if all(_is_plain(content) for content in contents):
        roles = tuple(message["role"] for message in messages)
        form = _form(tokenizer, str(tokenizer.chat_template), roles)
        if form is not None:
            return _filled(form, contents)
    return _rendered(tokenizer, messages)


_OPEN, _CLOSE = "\ue000", "\ue001"  # private characters, which no text and no template holds
_SLOT = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
_MARKUP = re.compile(r"[<\[]")
Form = list[tuple[list[str | int], bool]]
"""Stretches, each of texts and of numbers of the messages whose content stands there."""


def _is_plain(content: str) -> bool:
    """Whether a chat template has nothing to do about a content: templates trim, and look for tags such as </think>."""
    return bool(content) and content == content.strip() and not _MARKUP.search(content.replace(AUDIO_TOKEN, ""))


def _filled(form: Form, contents: list[str]) -> list[Stretch]:
    return [
        ("".join([part if isinstance(part, str) else contents[part] for part in parts]), is_answer)
        for parts, is_answer in form
    ]


@lru_cache(maxsize=256)
def _form(tokenizer: Any, chat_template: str, roles: tuple[str, ...]) -> Form | None:
    """What a chat template makes of turns of these roles; None for one that does not write contents as they are."""
    slots = [{"role": role, "content": f"{_OPEN}{index}{_CLOSE}"} for index, role in enumerate(roles)]
    form: Form = []
    for text, is_answer in _rendered(tokenizer, slots):
        pieces = _SLOT.split(text)  # text, slot, text, slot, …, text
        form.append(([int(piece) if place % 2 else piece for place, piece in enumerate(pieces)], is_answer))
    trial = [
        {
            "role": role,
            "content": f"{AUDIO_TOKEN * (role == 'user')}Trial {index}: one, two — and more words than a few.",
        }
        for index, role in enumerate(roles)
    ]
    return form if _filled(form, [turn["content"] for turn in trial]) == _rendered(tokenizer, trial) else None


def _rendered(tokenizer: Any, messages: list[Message]) -> list[Stretch]:
    """`stretches`, by the chat template itself."""
    found: list[Stretch] = []
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render_prompt(tokenizer, messages[:index])
        whole = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
        if not (prompt.startswith(done) and whole.startswith(prompt)):
            raise DataError("the chat template rewrites earlier turns: choose another with model.chat_template")
        answer, end = _split_end(tokenizer, whole[len(prompt) :])
        found += [(prompt[len(done) :], False), (answer, True)]
        done = whole[: len(whole) - len(end)] if end else whole
    if not found:
        raise DataError("the dialogue has no assistant turn: expected one to learn from")
    return found


def _split_end(tokenizer: Any, answer: str) -> tuple[str, str]:
    """An assistant's turn up to and with its last special token, and the white space that templates put after it."""
    end = answer[len(answer.rstrip()) :]
    answer = answer.rstrip()
    last = tokenizer.encode(answer, add_special_tokens=False)[-1:]
    if last and last[0] not in tokenizer.all_special_ids and tokenizer.eos_token:
        answer += tokenizer.eos_token  # a template without one would teach the model never to stop
    return answer, end
