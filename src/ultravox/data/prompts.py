"""The conversations that training and inference share, so that a model meets the prompts that it was trained on."""

from typing import Any, Literal

from ultravox.data.manifest import Clip
from ultravox.errors import DataError
from ultravox.tokens import AUDIO_TOKEN

TRANSCRIBE_PROMPT = "Transcribe"

Message = dict[str, str]
Task = Literal["transcription", "answer"]


def user_message(text: str = "", num_clips: int = 1) -> Message:
    """A user's turn: its clips first, then its text, as vLLM orders them too. Placeholders in `text` count as clips."""
    missing = max(0, num_clips - text.count(AUDIO_TOKEN))
    return {"role": "user", "content": AUDIO_TOKEN * missing + text}


def messages_for(clip: Clip, task: Task) -> list[Message]:
    """One training dialogue.

    Args:
        clip: with an `answer` for the task "answer".
        task: "transcription" = write down what is said; "answer" = reply to it.

    Raises:
        DataError: the clip has no answer.
    """
    if task == "transcription":
        return [user_message(TRANSCRIBE_PROMPT), {"role": "assistant", "content": clip.text}]
    if not clip.answer:
        raise DataError(f"clip {clip.id} has no answer: give it one, or use the task 'transcription'")
    return [user_message(), {"role": "assistant", "content": clip.answer}]


def render_prompt(tokenizer: Any, messages: list[Message]) -> str:
    """The dialogue as text, up to where the assistant begins to write."""
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def render(tokenizer: Any, messages: list[Message]) -> tuple[list[int], list[bool]]:
    """Token ids of a dialogue, and where the assistant speaks: its words and its end token, in each of its turns.

    Each stretch is tokenised by itself, as it is in inference: the prompt's last letters never merge with the answer's
    first ones.

    Raises:
        DataError: a chat template that rewrites earlier turns, or a dialogue without an assistant.
    """
    stretches: list[tuple[str, bool]] = []
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render_prompt(tokenizer, messages[:index])
        whole = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
        if not (prompt.startswith(done) and whole.startswith(prompt)):
            raise DataError("the chat template rewrites earlier turns: choose another with model.chat_template")
        answer, end = _split_end(tokenizer, whole[len(prompt) :])
        stretches += [(prompt[len(done) :], False), (answer, True)]
        done = whole[: len(whole) - len(end)] if end else whole
    if not stretches:
        raise DataError("the dialogue has no assistant turn: expected one to learn from")
    ids: list[int] = []
    supervised: list[bool] = []
    for text, is_answer in stretches:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        ids += tokens
        supervised += [is_answer] * len(tokens)
    return ids, supervised


def _split_end(tokenizer: Any, answer: str) -> tuple[str, str]:
    """An assistant's turn up to and with its last special token, and the white space that templates put after it."""
    end = answer[len(answer.rstrip()) :]
    answer = answer.rstrip()
    last = tokenizer.encode(answer, add_special_tokens=False)[-1:]
    if last and last[0] not in tokenizer.all_special_ids and tokenizer.eos_token:
        answer += tokenizer.eos_token  # a template without one would teach the model never to stop
    return answer, end
