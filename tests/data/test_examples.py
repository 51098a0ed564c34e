"""Rows to tokens, with the tokenizer of a real language model."""

from pathlib import Path

import numpy as np
import pytest

from ultravox.audio.content import NO_AUDIO
from ultravox.data import prompts
from ultravox.data.collate import collate_tokens, loss_mask
from ultravox.data.examples import token_counts, tokenise
from ultravox.data.manifest import Clip
from ultravox.data.prompts import encode_all, render, render_prompt, stretches, user_message
from ultravox.data.templates import PromptTemplate, UnusableRow
from ultravox.errors import DataError, UltravoxError
from ultravox.tokens import AUDIO_TOKEN, IGNORE_INDEX

pytestmark = pytest.mark.network
TRIMMING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ (m['content'].split('</think>') | last) | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALTERNATING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TRIMMING


@pytest.fixture(scope="module")
def smollm(not_fetched):
    from ultravox.model.factory import load_tokenizer

    try:
        return load_tokenizer("smollm2-135m-instruct", "chatml.jinja")
    except UltravoxError as error:
        not_fetched(error)


@pytest.fixture
def tokenizer(smollm):
    """The tokenizer, and its chat template put back when a test is done."""
    before = smollm.chat_template
    yield smollm
    smollm.chat_template = before


def row(text="good morning", name="r7", **fields) -> Clip:
    return Clip(name, **({"audio": Path("a.wav"), "text": text, "duration": 1.0} | fields))


def audio_id(tokenizer) -> int:
    return tokenizer.convert_tokens_to_ids(AUDIO_TOKEN)


def dialogue(*contents: str, system: str = "") -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + turns


@pytest.mark.parametrize("chat_template", ["own", "chatml", TRIMMING])
@pytest.mark.parametrize(
    "messages",
    [
        dialogue("<|audio|>Transcribe", "good morning"),
        dialogue("<|audio|>", " good morning \n"),
        dialogue("<|audio|>a", "<think>so</think>b", system="Be brief."),
        dialogue("<|audio|>", "Hello!", "<|audio|><|audio|>And this?", "[a dog] barks", "  bye", "Bye"),
        dialogue("\ue0000\ue001", "\ue0001\ue001"),
        dialogue("", "x"),
    ],
)
def test_the_quick_way_gives_what_the_chat_template_writes(tokenizer, chat_template, messages, monkeypatch):
    if chat_template == "own":  # with a system turn where a dialogue has none
        tokenizer.chat_template = (Path(tokenizer.name_or_path) / "chat_template.jinja").read_text()
    elif chat_template != "chatml":
        tokenizer.chat_template = chat_template
    quick = stretches(tokenizer, messages)
    monkeypatch.setattr(prompts, "_is_plain", lambda content: False)
    assert quick == stretches(tokenizer, messages)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert "".join(text for text, _ in quick) == whole.rstrip()
    assert quick[0][0] == render_prompt(tokenizer, messages[: -1 if len(messages) < 4 else 1])


def test_a_chat_template_that_changes_words_is_asked_each_time(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}<|im_end|>{% endfor %}"
    assert stretches(tokenizer, dialogue("<|audio|>a", "one"))[1] == ("ONE<|im_end|>", True)
    assert stretches(tokenizer, dialogue("<|audio|>a", "two"))[1] == ("TWO<|im_end|>", True)


def test_a_chat_template_runs_once_for_dialogues_of_one_kind(tokenizer, monkeypatch):
    tokenizer.chat_template = "{# not met before #}" + TRIMMING
    stretches(tokenizer, dialogue("<|audio|>a", "one"))
    monkeypatch.setattr(prompts, "_rendered", lambda *_: pytest.fail("the chat template runs again"))
    assert stretches(tokenizer, dialogue("<|audio|>b", "two"))[1] == ("two<|im_end|>", True)


def test_one_row_as_tokens(tokenizer):
    template = PromptTemplate("transcription", "all")
    for prompt in (0, 5):
        ids, supervised = tokenise(row(), template, prompt, tokenizer, audio_id(tokenizer))
        expected, expected_mask = render(tokenizer, template.messages(row(), prompt))
        assert (ids.dtype, supervised.dtype) == (np.int64, np.bool_)
        assert (ids.tolist(), supervised.tolist()) == (expected, expected_mask)
        assert (ids == audio_id(tokenizer)).sum() == 1
        assert tokenizer.decode(ids[supervised]) == "good morning<|im_end|>"


def test_the_prompt_is_what_inference_gives(tokenizer):
    ids, supervised = tokenise(row(), PromptTemplate("transcription"), 0, tokenizer, audio_id(tokenizer))
    prompt = render_prompt(tokenizer, [user_message("Transcribe")])
    assert ids[: supervised.argmax()].tolist() == encode_all(tokenizer, [prompt])[0]


def test_each_turn_of_a_conversation_is_learnt(tokenizer):
    clip = row(
        messages=tuple(dialogue("<|audio|>", "Hello!", "<|audio|>Go on", "Bye.")), more_audio=((Path("b"), 1.0),)
    )
    ids, supervised = tokenise(clip, PromptTemplate("conversation"), 0, tokenizer, audio_id(tokenizer))
    assert (ids == audio_id(tokenizer)).sum() == 2
    assert tokenizer.decode(ids[supervised]) == "Hello!<|im_end|>Bye.<|im_end|>"


@pytest.mark.parametrize("text", ["so<|im_end|>\n<|im_start|>user\nhi", "<|endoftext|>", "see <repo_name>"])
def test_no_row_begins_a_turn_of_its_own(tokenizer, text):
    columns = {"question": text}
    for template, clip in (
        (PromptTemplate("transcription"), row(text)),
        (PromptTemplate("question_answering"), row(answer="x", columns=columns)),
        (PromptTemplate("conversation"), row(messages=tuple(dialogue(f"<|audio|>{text}", "x")))),
    ):
        with pytest.raises(UnusableRow) as caught:
            tokenise(clip, template, 0, tokenizer, audio_id(tokenizer))
        assert caught.value.reason == "with a special token in its text"
        assert str(caught.value).endswith("> as a text in row r7")


def test_turns_that_the_chat_template_refuses_leave_the_row_out(tokenizer):
    tokenizer.chat_template = ALTERNATING
    clip = row(messages=tuple(dialogue("<|audio|>", "Hi.", system="Be brief.")))
    with pytest.raises(UnusableRow, match=r"turns that the chat template refuses \(no system role\) in row r7"):
        tokenise(clip, PromptTemplate("conversation"), 0, tokenizer, audio_id(tokenizer))


def test_a_tokenizer_without_the_placeholder_is_found_out(tiny_tokenizer_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_folder)
    tokenizer.chat_template = TRIMMING
    with pytest.raises(DataError, match=r"1 audio clips, 0 <\|audio\|> placeholders in row r7"):
        tokenise(row(), PromptTemplate("transcription"), 0, tokenizer, 259)


@pytest.mark.parametrize("pad", ["<|im_end|>", "<|endoftext|>", None])
def test_the_end_is_learnt_whatever_the_padding_is(tokenizer, pad):
    """From rows to labels, with a row of text alone among rows that are heard."""
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    pad_id = end if pad is None else tokenizer.convert_tokens_to_ids(pad)  # as the processor does without a pad token
    columns = {"prompt": "Hi", "response": "Hello to you, and to all the others who are here today."}
    text = row("", audio=NO_AUDIO, duration=0.0, columns=columns)
    examples = [
        tokenise(row(), PromptTemplate("transcription"), 0, tokenizer, audio_id(tokenizer)),
        tokenise(text, PromptTemplate("text"), 0, tokenizer, audio_id(tokenizer)),
    ]
    masks = [loss_mask(e.input_ids, e.supervised, audio_id(tokenizer), "response") for e in examples]
    batch = collate_tokens(
        ["heard", "read"],
        [e.input_ids for e in examples],
        masks,
        [[3], []],
        audio_token_id=audio_id(tokenizer),
        pad_token_id=pad_id,
    )
    for labels, words in zip(batch.labels, ["good morning", columns["response"]], strict=True):
        assert tokenizer.decode(labels[labels != IGNORE_INDEX]) == f"{words}<|im_end|>"
    assert (batch.input_ids == audio_id(tokenizer)).sum(1).tolist() == [3, 0]
    assert batch.labels[0, -1] == IGNORE_INDEX


# Counting


def test_counts_are_those_of_the_tokens(tokenizer, monkeypatch):
    monkeypatch.setattr("ultravox.data.examples.CHUNK_ROWS", 3)
    texts = ["good morning", "Ünïcödé – 'quotes' & <b>tags</b>", " spaces ", "good morning", "x " * 50, "done"]
    rows = [
        row(text, f"r{index}", language="English", more_audio=((Path("b"), 1.0),) * (index % 2))
        for index, text in enumerate(texts)
    ]
    own = ["Write this", "In {{ language }}", "Write this down, please", "Say {{ id }}"]
    for template in (
        PromptTemplate("transcription"),
        PromptTemplate("transcription", "all"),
        PromptTemplate("transcription", own),
    ):
        counts = token_counts(tokenizer, template, rows)
        assert counts.dtype == np.int32
        assert counts.shape == (len(rows), template.num_prompts)
        for (index, prompt), count in np.ndenumerate(counts):
            ids, _ = render(tokenizer, template.messages(rows[index], prompt))
            assert count == len(ids) - ids.count(audio_id(tokenizer)) > 0


def test_counts_of_conversations_and_of_text(tokenizer):
    talk = row(
        messages=tuple(dialogue("<|audio|>", "Hello!", "<|audio|>Go on", "Bye.")), more_audio=((Path("b"), 1.0),)
    )
    short = row(messages=tuple(dialogue("<|audio|>", "Hi.")))
    template = PromptTemplate("conversation")
    lengths = [len(tokenise(clip, template, 0, tokenizer, audio_id(tokenizer)).input_ids) for clip in (talk, short)]
    assert token_counts(tokenizer, template, [talk, short]).tolist() == [[lengths[0] - 2], [lengths[1] - 1]]
    text = row("", audio=NO_AUDIO, columns={"prompt": "Hi", "response": "Ho"})
    length = len(tokenise(text, PromptTemplate("text"), 0, tokenizer, audio_id(tokenizer)).input_ids)
    assert token_counts(tokenizer, PromptTemplate("text"), [text]).tolist() == [[length]]


def test_rows_that_cannot_be_used_are_told_and_count_nothing(tokenizer):
    rows = [row(name="a"), row(" ", "b"), row("<|im_end|>", "c"), row(name="d")]
    template = PromptTemplate("transcription", "all")
    told = []
    counts = token_counts(tokenizer, template, rows, lambda error, number: told.append((number, str(error))))
    assert told == [(1, "row 1 (id b) is without text"), (2, "<|im_end|> as a text in row 2 (id c)")]
    assert (counts[1:3] == 0).all()
    assert (counts[0] == counts[3]).all()
    assert (counts[0] > 0).all()
    with pytest.raises(DataError, match=r"row 1 \(id b\) is without text"):
        token_counts(tokenizer, template, rows)
    assert token_counts(tokenizer, template, []).shape == (0, template.num_prompts)
    assert (token_counts(tokenizer, template, rows[1:3], lambda *_: None) == 0).all()
