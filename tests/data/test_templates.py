"""Rows to dialogues: tasks, users' own phrasings, and rows that cannot be used."""

import pickle
import re
from pathlib import Path
from typing import get_args

import pytest

from ultravox.audio.content import NO_AUDIO
from ultravox.config.data import TaskName
from ultravox.config.load import parse_config
from ultravox.data.manifest import Clip
from ultravox.data.prompts import TRANSCRIBE_PROMPT, user_message
from ultravox.data.tasks import TASKS
from ultravox.data.templates import PromptTemplate, UnusableRow, columns_of
from ultravox.errors import DataError

SOUND = Path("a.wav")


def row(text="good morning", *, audio=SOUND, more=0, messages=None, answer=None, language="", **columns) -> Clip:
    more_audio = tuple((Path(f"{number}.wav"), 1.0) for number in range(more))
    return Clip(
        "r7", audio, text, 1.0, answer=answer, language=language, columns=columns, more_audio=more_audio,
        messages=messages,
    )  # fmt: skip


def said(template: PromptTemplate, clip: Clip, prompt: int = 0) -> tuple[str, str]:
    user, assistant = template.messages(clip, prompt)
    assert (user["role"], assistant["role"]) == ("user", "assistant")
    return user["content"], assistant["content"]


def reason(template: PromptTemplate, clip: Clip) -> str:
    with pytest.raises(UnusableRow) as caught:
        template.messages(clip)
    return caught.value.reason


def turns(*contents: str) -> tuple[dict[str, str], ...]:
    return tuple({"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents))


# Tasks


def test_every_task_of_the_configuration_is_there():
    assert set(TASKS) == set(get_args(TaskName))


def test_transcription_begins_as_inference_does_and_has_many_phrasings():
    every = PromptTemplate("transcription", "all")
    first = [user_message(TRANSCRIBE_PROMPT), {"role": "assistant", "content": "good morning"}]
    assert PromptTemplate("transcription").messages(row()) == first
    assert said(every, row()) == (f"<|audio|>{TRANSCRIBE_PROMPT}", "good morning")
    found = {said(every, row(), prompt)[0] for prompt in range(every.num_prompts)}
    assert len(found) == every.num_prompts >= 21
    assert PromptTemplate("transcription").num_prompts == 1


def test_translation_names_the_language_where_the_row_does():
    template = PromptTemplate("translation", "all")
    with_language = row(translation="bonjour", target_language="French")
    assert said(template, with_language) == ("<|audio|>Translate to French", "bonjour")
    assert said(template, row(translation="bonjour")) == ("<|audio|>Translate", "bonjour")
    for prompt in range(template.num_prompts):
        assert "French" in said(template, with_language, prompt)[0]
        assert "  " not in said(template, row(translation="bonjour"), prompt)[0]
    assert template.columns_needed == {"translation"}


@pytest.mark.parametrize("task", ["answer", "continuation"])
def test_the_audio_alone_is_the_request(task):
    assert said(PromptTemplate(task), row(answer="Hi!")) == ("<|audio|>", "Hi!")
    assert reason(PromptTemplate(task), row()) == "without answer"


def test_a_written_question_comes_after_the_audio():
    template = PromptTemplate("question_answering")
    clip = row(question="Who speaks?", answer="A woman.")
    assert said(template, clip) == ("<|audio|>Who speaks?", "A woman.")
    assert reason(template, row(answer="A woman.")) == "without question"


@pytest.mark.parametrize(
    ("value", "word"),
    [(True, "Yes"), (False, "No"), ("False", "No"), ("true", "Yes"), (0, "No"), ("1", "Yes"), ("no", "No")],
)
def test_whether_the_speaker_has_finished(value, word):
    assert said(PromptTemplate("endpointing"), row(complete=value))[1] == word


def test_an_ending_that_is_neither_true_nor_false_is_left_out():
    with pytest.raises(UnusableRow, match="expected true or false, got 'maybe'") as caught:
        PromptTemplate("endpointing").messages(row(complete="maybe"))
    assert caught.value.reason == "with values that do not fit its template"
    assert reason(PromptTemplate("endpointing"), row()) == "without complete"


def test_a_conversation_is_the_rows_own():
    messages = turns("<|audio|>", "Hello!", "And <|audio|> this?", "A dog.")
    template = PromptTemplate("conversation")
    assert template.messages(row(more=1, messages=messages)) == [dict(turn) for turn in messages]
    assert template.num_prompts == 1
    assert reason(template, row()) == "without messages"
    written = turns("What is a dog?", "An animal.")
    assert template.messages(row(audio=NO_AUDIO, messages=written)) == [dict(turn) for turn in written]


def test_placeholders_that_do_not_fit_name_the_row():
    clip = row(more=2, messages=turns("<|audio|>", "One.", "<|audio|>", "Two."))
    with pytest.raises(DataError, match=r"^3 audio clips, 2 <\|audio\|> placeholders in row r7$") as caught:
        PromptTemplate("conversation").messages(clip)
    assert isinstance(caught.value, UnusableRow)
    assert str(caught.value.at(7)) == "3 audio clips, 2 <|audio|> placeholders in row 7 (id r7)"
    assert caught.value.reason == "with other placeholders than recordings"


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        (turns("<|audio|>"), "without answer"),
        (turns("<|audio|>", "Hi.", "bye"), "without answer"),
        (turns("<|audio|>", "  ", "<|audio|>", "x"), "without answer"),
        ((), "without answer"),
        (turns("", "I hear <|audio|>"), "with a special token in its text"),
        (({"role": "robot", "content": "<|audio|>"},), "with messages of another form"),
        (({"role": "user", "content": None},), "with messages of another form"),
        (("hello",), "with messages of another form"),
    ],
)
def test_dialogues_that_nothing_can_be_learnt_from(messages, why):
    assert reason(PromptTemplate("conversation"), row(messages=messages)) == why


def test_text_alone():
    template = PromptTemplate("text")
    assert said(template, row("", audio=NO_AUDIO, prompt="2 + 2?", response="4")) == ("2 + 2?", "4")
    messages = turns("hello", "Hi.", "bye", "Bye.")
    assert template.messages(row("", audio=NO_AUDIO, messages=messages)) == [dict(turn) for turn in messages]
    assert reason(template, row("", audio=NO_AUDIO, response="4")) == "without prompt"


def test_the_text_of_a_recording_may_be_read_instead_of_heard():
    template = PromptTemplate("text", ["{{ text }}"], "{{ answer }}")
    clip = row(answer="Hello to you.")
    assert said(template, clip) == ("good morning", "Hello to you.")
    assert template.recordings(clip) == ()
    assert PromptTemplate("answer").recordings(row(more=1)) == ((SOUND, 1.0), (Path("0.wav"), 1.0))


def test_a_row_without_audio_is_not_heard():
    assert reason(PromptTemplate("transcription"), row(audio=NO_AUDIO)) == "without audio"


def test_several_recordings_come_before_the_words_unless_the_template_places_them():
    assert said(PromptTemplate("transcription"), row(more=1))[0] == "<|audio|><|audio|>Transcribe"
    placed = PromptTemplate("transcription", ["First <|audio|> then <|audio|>: write both"])
    assert said(placed, row(more=1))[0] == "First <|audio|> then <|audio|>: write both"
    assert reason(placed, row()) == "with other placeholders than recordings"


# Users' own templates


def test_users_own_phrasings():
    template = PromptTemplate(
        "transcription",
        ["Write this down, in {{ language }}.", "{% if mood %}Mind the {{ mood }} tone. {% endif %}Go"],
        "{{ text | upper }}",
    )
    assert template.num_prompts == 2
    clip = row(language="English", mood="")
    assert said(template, clip) == ("<|audio|>Write this down, in English.", "GOOD MORNING")
    assert said(template, clip, 1)[0] == "<|audio|>Go"
    assert template.columns_needed == {"language", "mood", "text"}
    assert reason(template, row(mood="sad")) == "without language"


def test_a_text_is_written_as_it_stands():
    assert said(PromptTemplate("transcription"), row("a < b & 'c' {{ id }}"))[1] == "a < b & 'c' {{ id }}"


def test_an_answer_of_spaces_is_none():
    assert reason(PromptTemplate("transcription"), row("  ")) == "without text"
    assert reason(PromptTemplate("answer", response="{{ text[20:] }}"), row()) == "without answer"


def test_a_column_that_the_source_has_not_is_an_error_at_load_time():
    template = PromptTemplate("transcription", ["Write, in {{ langage }}."])
    rows = [row(language="English", mood="calm")] * 2
    with pytest.raises(DataError, match=r"in \{\{ langage \}\}.*'langage', which calls.jsonl has not: it has .*lang"):
        template.require_columns(rows, "calls.jsonl")
    with pytest.raises(DataError, match="the task 'conversation' needs the column 'messages'"):
        PromptTemplate("conversation").require_columns(rows, "calls.jsonl")
    PromptTemplate("transcription", ["in {{ language }}"]).require_columns([row(), *rows], "calls.jsonl")
    PromptTemplate("text").require_columns([row(messages=turns("a", "b"))], "calls.jsonl")
    for theirs, columns, what in (
        ("lang", {}, r"a column 'lang' is read as 'language', so write \{\{ language \}\}"),
        ("transcript", {}, r"a column 'transcript' is read as 'text', so write"),
        ("audio_filepath", {}, "is read as 'audio', which is heard and which no template can write"),
        ("tone", {"mood": "tone"}, "a column 'tone' is read as 'mood', so write"),
        ("lang", {"language": "l"}, "name another, or say with `columns` which is meant"),
    ):
        with pytest.raises(DataError, match=f"needs the column '{theirs}', which calls.jsonl has not: .*{what}"):
            PromptTemplate("transcription", [f"{{{{ {theirs} }}}}"]).require_columns(rows, "calls.jsonl", columns)
    assert columns_of(rows[0]).keys() == {"id", "text", "duration", "language", "mood"}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ text", "cannot be read: unexpected end"),
        ("{{ text | nonsense }}", "cannot be read: No filter named 'nonsense'"),
        ("{{ text | random }}", "No filter named 'random'"),
        ("{{ text.__class__ }}", "may not use the private attribute '__class__'"),
        ("{{ text['__class__'] }}", "may not use the private attribute '__class__'"),
        ("{{ text | attr('__class__') }}", "may not use the private attribute '__class__'"),
        ("{% include 'secrets.txt' %}", "may not use include"),
        ("{{ 1 / 0 }}", "fails: division by zero"),
        ("{{ 'a'.nothing }}", "fails: 'str object' has no attribute 'nothing'"),
    ],
)
def test_templates_that_are_refused(template, message):
    with pytest.raises(DataError, match=message) as caught:
        PromptTemplate("transcription", [template])
    assert "\n" not in str(caught.value)


def test_the_sandbox_stops_what_is_hidden_from_the_reader():
    template = PromptTemplate("transcription", ["{{ text | attr('_' ~ '_class_' ~ '_') }}"])
    with pytest.raises(DataError, match="refused") as caught:
        template.messages(row())
    assert not isinstance(caught.value, UnusableRow)
    tags = ["calm"]
    with pytest.raises(DataError, match="refused"):
        PromptTemplate("transcription", ["{{ tags.append('loud') }}"]).messages(row(tags=tags))
    assert tags == ["calm"]


def test_every_name_is_a_column():
    template = PromptTemplate("transcription", ["{{ lipsum }}{{ range }}"])
    assert template.columns_needed == {"lipsum", "range", "text"}
    assert reason(template, row(range="1–2")) == "without lipsum"
    assert said(template, row(range="1–2", lipsum="of "))[0] == "<|audio|>of 1–2"


def test_an_expression_that_fails_on_a_row_leaves_the_row_out():
    template = PromptTemplate("transcription", ["{{ 60 / score }}"])
    assert said(template, row(score=3))[0] == "<|audio|>20.0"
    for score in (0, "high"):
        assert reason(template, row(score=score)) == "with values that do not fit its template"
    assert (
        reason(PromptTemplate("text", ["{{ info.name }}"]), row(info={})) == "with values that do not fit its template"
    )


def test_a_row_that_does_not_fit_is_called_by_what_did_not(tmp_path):
    template = PromptTemplate("transcription", ["{{ 60 / score }} of {{ language }}"])
    with pytest.raises(UnusableRow) as caught:
        template.messages(row(score=0, language="en", mood="calm"))
    failure = (
        "the template '{{ 60 / score }} of {{ language }}' fails with language = 'en', score = 0: division by zero"
    )
    assert caught.value.name == f"r7 ({failure})"
    assert str(caught.value) == f"{failure} in row r7"
    with pytest.raises(UnusableRow) as caught:
        PromptTemplate("text", ["{{ info.name }}"]).messages(row(info={"nme": "x" * 99}))
    assert caught.value.name == (
        f"r7 (the template '{{{{ info.name }}}}' fails with info = {{'nme': '{'x' * 30}…: "
        "'dict object' has no attribute 'name')"
    )
    with pytest.raises(UnusableRow) as caught:
        template.messages(row(score=3))
    assert caught.value.name == "r7"


def test_no_row_smuggles_a_recording_in():
    template = PromptTemplate("question_answering")
    for question, answer in (("Is <|audio|> it?", "Yes"), ("Is it?", "<|audio|>")):
        assert reason(template, row(question=question, answer=answer)) == "with a special token in its text"
    joined = PromptTemplate("question_answering", ["{{ first }}{{ second }}"])
    assert reason(joined, row(first="<|aud", second="io|>", answer="x")) == "with a special token in its text"


def test_what_does_not_go_together():
    with pytest.raises(DataError, match="takes each row's own messages"):
        PromptTemplate("conversation", ["{{ text }}"])
    with pytest.raises(DataError, match="no task 'transcribe': expected one of transcription, "):
        PromptTemplate("transcribe")
    with pytest.raises(DataError, match="given no prompts"):
        PromptTemplate("transcription", [])


def test_templates_and_their_errors_reach_other_processes():
    template = pickle.loads(pickle.dumps(PromptTemplate("transcription", ["{{ id }}"], "{{ text }}!")))
    assert said(template, row()) == ("<|audio|>r7", "good morning!")
    error = pickle.loads(pickle.dumps(UnusableRow("without text", "r7").at(3)))
    assert (str(error), error.reason) == ("row 3 (id r7) is without text", "without text")


def test_the_examples_of_the_manual_are_right():
    """Each source in the section makes templates, and the columns that it names are those that its comment says."""
    manual = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    section = manual.partition("## Tasks and prompts")[2].partition("\n## ")[0]
    blocks = re.findall(r"```yaml\n(.*?)```", section, flags=re.DOTALL)
    stages = "stages: [{name: tune, objective: tune, max_steps: 1}]"
    sources = [source for block in blocks for source in parse_config(block + stages).data.sources]
    assert len(sources) >= 5
    for source in sources:
        template = PromptTemplate(source.task, source.prompts, source.response)
        assert template.columns_needed - {"text"} <= source.columns.keys() | {"answer", "messages", "language"}
    for task in TASKS:
        assert f"| `{task}` |" in section
