"""Texts to be spoken: from files, templates and a language model; and which of them are taken."""

import itertools
import json
from pathlib import Path

import pytest

from ultravox.data.journal import Journal
from ultravox.data.splits import HeldoutFilter
from ultravox.data.texts.fill_templates import TemplateTexts, read_values
from ultravox.data.texts.items import FileTexts, SpokenText, select_texts
from ultravox.data.texts.writer import BATCH, TRIES_PER_TEXT, WrittenTexts, clean
from ultravox.errors import DataError

NOTHING_HELD_OUT = HeldoutFilter([])


@pytest.fixture
def journal(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl", {})
    yield journal
    journal.close()


def file_texts(path: Path, content: str, journal: Journal) -> list[SpokenText]:
    path.write_text(content, encoding="utf-8")
    return list(FileTexts(path).texts(journal))


def test_lines_keep_their_place(tmp_path, journal):
    texts = file_texts(tmp_path / "a.txt", "\ufeffHello there.\r\n\n Grüße.\n", journal)
    chosen, left_out = select_texts(texts, None, NOTHING_HELD_OUT, 100)
    assert [(text.text, text.source) for text in chosen] == [("Hello there.", "a.txt:1"), ("Grüße.", "a.txt:3")]
    assert left_out == []


def test_rows_keep_their_columns(tmp_path, journal):
    row = {
        "text": "Hello.",
        "answer": "Hi.",
        "id": "x",
        "language": "en",
        "licence": "CC0-1.0",
        "mood": 3,
        "voice": "me",
    }
    (text,) = file_texts(tmp_path / "a.jsonl", json.dumps(row) + "\n", journal)
    assert text == SpokenText("Hello.", "a.jsonl:1", "x", "Hi.", "en", "CC0-1.0", {"mood": 3, "source_voice": "me"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"words": "a"}', r"line 1: the key 'text' is missing: it has words"),
        ('{"text": 3}', r"line 1: 'text' must be a string, got 3"),
        ('{"text": "a", "id": 3}', r"line 1: 'id' must be a string, got 3"),
        ('{"text": "a"}\n{"te', r"line 2: not a whole JSON object"),
        ("[1]", "line 1: a JSON array begins here"),
    ],
)
def test_a_bad_row_is_named(content, message, tmp_path, journal):
    with pytest.raises(DataError, match=message):
        file_texts(tmp_path / "a.jsonl", content, journal)


def test_what_is_left_out_is_told():
    texts = [
        SpokenText("Please press  five.", "a:1"),
        SpokenText("please press five", "a:2"),
        SpokenText("— …", "a:3"),
        SpokenText("x" * 51, "a:4"),
        SpokenText("Now please say your name, thanks.", "a:5"),
        SpokenText("你好", "a:6"),
        SpokenText("再见", "a:7"),
    ]
    chosen, left_out = select_texts(texts, None, HeldoutFilter(["Say your name!"]), 50)
    assert [text.text for text in chosen] == ["Please press five.", "你好", "再见"]
    assert [(one.text.source, one.reason) for one in left_out] == [
        ("a:2", "same words as a:1"),
        ("a:3", "no words"),
        ("a:4", "longer than 50 characters"),
        ("a:5", "held out"),
    ]


def test_too_few_texts_are_an_error():
    texts = [SpokenText("One.", "a:1"), SpokenText("one", "a:2")]
    assert len(select_texts(texts, 1, NOTHING_HELD_OUT, 50)[0]) == 1
    with pytest.raises(
        DataError, match=r"there are 1 usable texts \(1 left out, .*same words.*\), but 2 are asked for"
    ):
        select_texts(texts, 2, NOTHING_HELD_OUT, 50)
    with pytest.raises(DataError, match="there are no usable texts, but at least one is needed"):
        select_texts([], None, NOTHING_HELD_OUT, 50)


def test_one_id_is_one_text():
    with pytest.raises(DataError, match="a:2: id 'x' is already used in a:1"):
        select_texts([SpokenText("A.", "a:1", "x"), SpokenText("B.", "a:2", "x")], None, NOTHING_HELD_OUT, 50)


VALUES = {"name": ["Maria", "John", "Ana"], "number": ["one", "two"], "voice": ["loud"]}


def test_every_combination_comes_in_order(journal):
    texts = list(
        TemplateTexts(["Call {{ name }} at {{ number | upper }}.", "A {{ voice }} one."], VALUES).texts(journal)
    )
    assert [text.text for text in texts] == [
        "Call Maria at ONE.",
        "A loud one.",
        *["Call Maria at TWO.", "Call John at ONE.", "Call John at TWO.", "Call Ana at ONE.", "Call Ana at TWO."],
    ]
    assert texts[0].columns == {"name": "Maria", "number": "one"}
    assert texts[1].columns == {"source_voice": "loud"}
    assert len({text.source for text in texts}) == 2


def test_a_sample_is_a_function_of_the_seed(journal):
    def drawn(seed: int, values=VALUES) -> list[str]:
        source = TemplateTexts(["Call {{ name }} at {{ number }}."], values, sample=True, seed=seed)
        return [text.text for text in itertools.islice(source.texts(journal), 6)]

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    assert set(drawn(0)) == set(drawn(1))
    many = {"name": [str(number) for number in range(5000)], "number": [str(number) for number in range(5000)]}
    assert drawn(0, many) == drawn(0, many)
    assert len(set(drawn(0, many))) == 6


def test_too_many_combinations_must_be_sampled(journal):
    many = {"a": list(range(2000)), "b": list(range(2000))}
    with pytest.raises(DataError, match="4000000 combinations: give --num-texts"):
        list(TemplateTexts(["{{ a }} {{ b }}"], many).texts(journal))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("Call {{ name", "cannot be read: unexpected end of template"),
        ("Call {{ nobody }}.", "names 'nobody', but the values are: name, number, voice"),
        ("{% include 'x' %}", "fails for"),
        ("{{ name.first }}", "fails for .*has no attribute 'first'"),
        ("{{ name.__class__.__mro__ }}", "fails for .*unsafe"),
        ("{{ 1 // 0 }}", "fails for"),
    ],
)
def test_a_bad_template_is_one_line(template, message, journal):
    with pytest.raises(DataError, match=message):
        list(TemplateTexts([template], VALUES).texts(journal))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "is not YAML"),
        ("- a", "expected names with lists of values, got list"),
        ("name: Maria", "'name' must be a list with values, got 'Maria'"),
        ("name: []", "'name' must be a list"),
        ("text: [a]", "'text' is a column of every row already"),
    ],
)
def test_bad_values_are_named(content, message, tmp_path):
    (tmp_path / "v.yaml").write_text(content)
    with pytest.raises(DataError, match=message):
        read_values(tmp_path / "v.yaml")
    with pytest.raises(DataError, match="cannot read the values"):
        read_values(tmp_path / "none.yaml")


def test_dates_are_spelt_out(tmp_path):
    (tmp_path / "v.yaml").write_text("day: [2024-05-01, 3]")
    assert read_values(tmp_path / "v.yaml") == {"day": ["2024-05-01", 3]}


class Writer:
    """Writes the last word of each prompt's quotation, and counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def __call__(self, prompts, seed):
        self.asked.append((len(prompts), seed))
        return [f'"{prompt.split(chr(34))[1]} is the word."\n\nYes.' for prompt in prompts]


def test_a_writer_is_asked_once_with_a_word_for_each_text(tmp_path):
    def written(path: Path) -> list[SpokenText]:
        journal = Journal(path, {})
        source = WrittenTexts(writer, "small", 100, topic="tea", language="en", seed=3)
        texts = list(itertools.islice(source.texts(journal), 100))
        journal.close()
        return texts

    writer = Writer()
    texts = written(tmp_path / "a")
    assert len({text.text for text in texts}) == 100
    assert all(text.text.endswith("is the word.") for text in texts)
    assert len({text.source for text in texts}) == 100
    assert texts[0].source.startswith("small, prompt ")
    assert writer.asked == [(BATCH, 3), (BATCH, 3 + BATCH)]
    assert written(tmp_path / "a") == texts
    assert len(writer.asked) == 2, "what was written is not written again"
    assert written(tmp_path / "b") == texts


def test_the_prompt_says_what_is_wanted():
    source = WrittenTexts(Writer(), "small", 5, topic="tea", instructions="Ask a question.", language="de")
    assert source.prompt("cup") == (
        'Ask a question. It is about tea. It is in the language de. It has to do with the word "cup". '
        "Write nothing else."
    )
    assert "It is about tea." in source.settings()["prompt"]


def test_a_writer_that_repeats_itself_is_given_up(journal):
    asked = []

    def write(prompts, seed):
        asked.extend(prompts)
        return ["Again."] * len(prompts)

    with pytest.raises(DataError, match=r"there are 1 usable texts \(49 left out"):
        select_texts(WrittenTexts(write, "small", 10).texts(journal), 10, NOTHING_HELD_OUT, 50)
    assert len(asked) == 10 * TRIES_PER_TEXT
    with pytest.raises(DataError, match="small wrote 1 texts for 7 prompts"):
        next(
            WrittenTexts(lambda prompts, seed: ["one"], "small", 7).texts(Journal(journal.path.with_name("other"), {}))
        )


@pytest.mark.parametrize(
    ("text", "expected"),
    [('"Hello."', "Hello."), ("\n “Hello.” \nMore.", "Hello."), ("", ""), ("It's", "It's"), ("**Hi!**", "Hi!")],
)
def test_quotation_marks_are_taken_off(text, expected):
    assert clean(text) == expected
