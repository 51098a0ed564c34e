"""``ultravox data synthesize``: whole runs over real HTTP and with real models, and what is refused in one line."""

import json
from pathlib import Path

import numpy as np
import pytest

from ultravox.cli import datasets
from ultravox.cli.main import main
from ultravox.data import casting
from ultravox.data.casting import CastVoice
from ultravox.data.sources import load_clips
from ultravox.data.voices import Voice

KEY = "sk-nobody-may-see-this"


class Hum(Voice):
    """Hums for as long as the text."""

    name, sample_rate = "hum", 16000

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def speak(self, text: str, pace: float, noise: float) -> np.ndarray:
        return np.sin(np.arange(int(300 * len(text) * pace)) * 0.3 + self.seed).astype(np.float32)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in, where the bundled voice hums."""
    monkeypatch.chdir(tmp_path)
    joe = CastVoice("piper-joe", "piper", "1.0", "CC0-1.0", Hum, 4)
    real = casting.cast_voice
    monkeypatch.setattr(casting, "cast_voice", lambda name, *rest: joe if name == "piper-joe" else real(name, *rest))
    (tmp_path / "lines.txt").write_text("Please press five.\nThank you.\nplease press five\n")
    (tmp_path / "values.yaml").write_text("name: [Maria, John]\nnumber: [one, two]\n")
    return tmp_path


def synthesize(*words: str) -> int:
    return main(["data", "synthesize", *words])


def test_a_file_becomes_a_dataset_that_other_commands_take(place, capsys):
    words = ["lines.txt", "--output", "made/calls", "--speed", "0.8", "--speed", "1.2", "--licence", "CC0-1.0"]
    assert synthesize(*words) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("made/calls: train, 4 clips, ")
    assert out[1:] == ["made/calls/quarantine.jsonl: texts left out: 1"]
    assert main(["data", "inspect", "made/calls"]) == 0
    assert "CC0-1.0" in capsys.readouterr().out
    assert synthesize(*words) == 0, "it is there already"
    assert synthesize(*words, "--seed", "1") == 2
    assert "calls was made with seed 0 (now 1)" in capsys.readouterr().err
    assert synthesize(*words, "--seed", "1", "--overwrite") == 0
    assert {row["seed"] for row in rows(place / "made" / "calls")} != {0}


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def test_templates_are_filled(place):
    words = ["--template", "Call {{ name }} at {{ number }}.", "--values", "values.yaml", "--output"]
    assert synthesize(*words, "all", "--language", "en") == 0
    assert [(row["text"], row["name"], row["language"]) for row in rows(place / "all")] == [
        ("Call Maria at one.", "Maria", "en"),
        ("Call Maria at two.", "Maria", "en"),
        ("Call John at one.", "John", "en"),
        ("Call John at two.", "John", "en"),
    ]
    assert synthesize(*words, "some", "--num-texts", "2") == 0
    assert {row["text"] for row in rows(place / "some")} < {row["text"] for row in rows(place / "all")}


def test_servers_write_and_speak_and_no_file_holds_a_key(place, speech_server, monkeypatch, capfd):
    monkeypatch.setenv("MY_KEY", KEY)
    words = ["--writer-url", speech_server.url, "--writer-model", "big", "--writer-key-env", "MY_KEY"]
    words += ["--num-texts", "12", "--topic", "tea", "--seed", "5", "--workers", "3", "--output", "served"]
    words += ["--voice", "openai:alloy", "--speech-url", speech_server.url, "--speech-model", "tts"]
    words += ["--speech-key-env", "MY_KEY", "--voice-licence", "by contract"]
    assert synthesize(*words) == 0
    found = rows(place / "served")
    assert len(found) == 12
    assert all(row["text"].startswith("The ") and row["text_source"].startswith("big, prompt ") for row in found)
    assert {row["voice_licence"] for row in found} == {"by contract"}
    assert all(headers["Authorization"] == f"Bearer {KEY}" for _, headers, _ in speech_server.requests)
    chats = [body for path, _, body in speech_server.requests if path.endswith("completions")]
    assert {body["seed"] for body in chats} == set(range(5, 5 + len(chats)))
    assert all("It is about tea." in body["messages"][0]["content"] for body in chats)
    written = b"".join(path.read_bytes() for path in place.rglob("*") if path.is_file())
    assert KEY.encode() not in written
    assert KEY not in "".join(capfd.readouterr())
    count = len(speech_server.requests)
    assert synthesize(*words) == 0
    assert len(speech_server.requests) == count, "nothing is asked twice"


def test_a_server_that_stops_is_gone_on_with(place, speech_server, capsys):
    words = ["lines.txt", "--output", "served", "--workers", "1", "--voice", "openai:alloy"]
    words += ["--speech-url", speech_server.url, "--speech-model", "tts"]
    speech_server.failures = [(403, {}, b"no money left")]
    assert synthesize(*words) == 2
    error = capsys.readouterr().err
    assert "status 403: no money left; check the key" in error
    assert error.count("\n") == 1
    assert synthesize(*words) == 0
    assert len(rows(place / "served")) == 2


def test_a_local_model_answers(place, tiny_models):
    """A random model: what it says is noise, and the same noise each time."""
    (place / "one.jsonl").write_text('{"text": "Name a colour."}\n{"text": "Say hello.", "answer": "Hello."}\n')
    words = ["one.jsonl", "--answers", str(tiny_models.llama), "--max-quarantine-share", "1", "--output"]
    assert synthesize(*words, "a") == 0
    (expected,) = datasets.text_answers(str(tiny_models.llama), "chatml.jinja")(["Name a colour."])
    answers = [clip.answer for clip in load_clips(place / "a", "train")]
    assert answers == ([expected] if expected.strip() else []) + ["Hello."]
    assert expected, "a model that says nothing shows nothing"
    assert str(tiny_models.llama) in rows(place / "a")[0]["answered_by"]


def test_a_local_model_writes(place, monkeypatch):
    """What a random model writes has no words; the test before this one has it answer."""
    asked = []

    def text_answers(model, template):
        return lambda prompts: asked.append((model, template, len(prompts))) or [p.split('"')[1] for p in prompts]

    monkeypatch.setattr(datasets, "text_answers", text_answers)
    assert synthesize("--writer", "small", "--chat-template", "mine", "--num-texts", "2", "--output", "b") == 0
    assert asked == [("small", "mine", 2)]
    assert all(row["text_source"].startswith("small, prompt ") for row in rows(place / "b"))


def test_held_out_texts_stay_out(place, capsys):
    assert synthesize("lines.txt", "--output", "heldout") == 0
    (place / "more.txt").write_text("Now please press five.\nGood night.\n")
    assert synthesize("more.txt", "--heldout", "heldout/train.jsonl", "--output", "clean") == 0
    assert [row["text"] for row in rows(place / "clean")] == ["Good night."]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected one of FILE, --template, --writer, --writer-url, got none"),
        (["lines.txt", "--template", "a"], "got FILE and --template"),
        (["none.txt"], "cannot read the texts none.txt: No such file"),
        (["values.yaml"], "expected texts in a .txt or a .jsonl file"),
        (["empty.txt"], "there are no usable texts"),
        (["binary.txt"], "binary.txt, line 1: not UTF-8"),
        (["--template", "{{ name"], "cannot be read: unexpected end of template"),
        (["--template", "{{ name }}"], "names 'name', but the values are: none"),
        (["--template", "{{ size }}", "--values", "values.yaml"], "names 'size', but the values are: name, number"),
        (["--template", "a", "--values", "none.yaml"], "cannot read the values none.yaml"),
        (["lines.txt", "--values", "values.yaml"], "--values is of use with --template alone"),
        (["lines.txt", "--topic", "tea"], "--topic and --instructions are of use with"),
        (["--writer", "smollm2-135m-instruct"], "--writer needs --num-texts"),
        (["--writer-url", "http://localhost/v1", "--num-texts", "3"], "--writer-url and --writer-model go together"),
        (["lines.txt", "--speech-url", "http://localhost/v1"], "--speech-url and --speech-model go together"),
        (["lines.txt", "--voice", "openai:x"], "give --speech-url and --speech-model"),
        (["lines.txt", "--voice", "hibari"], "no voice 'hibari': did you mean hibari-heart"),
        (["lines.txt", "--voice", "my.onnx"], "no voice my.onnx: there is no such file"),
        (["lines.txt", "--speed", "9"], "--speed takes 0.25 to 4, got 9"),
        (["lines.txt", "--speed", "nan"], "--speed takes 0.25 to 4, got nan"),
        (["lines.txt", "--num-texts", "0"], "--num-texts takes 1 to"),
        (["lines.txt", "--num-texts", "7"], "there are 2 usable texts (1 left out"),
        (["lines.txt", "--max-quarantine-share", "2"], "--max-quarantine-share takes 0 to 1, got 2"),
        (["lines.txt", "--heldout", "nowhere"], "no dataset nowhere"),
        (
            ["--writer-url", "ftp://x", "--writer-model", "a", "--num-texts", "1"],
            "expected a URL such as http://localhost:8000/v1, got 'ftp://x'",
        ),
        (
            [
                "--writer-url",
                "http://localhost/v1",
                "--writer-model",
                "a",
                "--num-texts",
                "1",
                "--writer-key-env",
                "NO",
            ],
            "the environment variable NO is not set",
        ),
    ],
)
def test_a_mistake_is_one_line(words, message, place, capsys):
    (place / "empty.txt").write_text("\n \n")
    (place / "binary.txt").write_bytes(b"\xff\xfe\x00a\n")
    assert synthesize(*words, "--output", "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("ultravox: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (place / "out" / "dataset.json").exists()


def test_a_failed_start_leaves_nothing_and_a_mended_file_is_taken(place, capsys):
    for bad in ('{"words": "no text"}\n', "\n \n", '{"id": "a", "text": "One."}\n{"id": "a", "text": "Two."}\n'):
        (place / "rows.jsonl").write_text(bad)
        assert synthesize("rows.jsonl", "--output", "made/out") == 2
        assert capsys.readouterr().err.count("\n") == 1
        assert not (place / "made").exists()
    (place / "rows.jsonl").write_text('{"text": "One."}\n')
    assert synthesize("rows.jsonl", "--output", "made/out") == 0
    whole = (place / "made" / "out" / "train.jsonl").read_bytes()
    (place / "rows.jsonl").write_text("\n")
    assert synthesize("rows.jsonl", "--output", "made/out", "--overwrite") == 2
    assert (place / "made" / "out" / "train.jsonl").read_bytes() == whole, "a bad file costs no dataset"
    (place / "rows.jsonl").write_text('{"text": "Two."}\n')
    capsys.readouterr()
    assert synthesize("rows.jsonl", "--output", "made/out") == 2
    error = capsys.readouterr().err
    assert error.endswith(
        "made/out was made with another content of rows.jsonl (it has changed since): choose another place, or "
        "--overwrite it\n"
    )


def test_a_server_that_wrote_nothing_binds_nobody(place, speech_server, capsys):
    words = ["--writer-url", speech_server.url, "--num-texts", "1", "--output", "out", "--writer-model"]
    speech_server.failures = [(404, {}, b"no such model")]
    assert synthesize(*words, "misspelt") == 2
    assert not (place / "out").exists()
    assert synthesize(*words, "writer") == 0


def test_overwrite_removes_datasets_alone(place, capsys):
    (place / "mine").mkdir()
    (place / "mine" / "thesis.txt").write_text("years of work")
    assert synthesize("lines.txt", "--output", "mine", "--overwrite") == 2
    assert "mine is no dataset, so it is not overwritten" in capsys.readouterr().err
    assert (place / "mine" / "thesis.txt").read_text() == "years of work"


def test_the_help_has_examples_and_voices(capsys):
    assert synthesize("--help") == 0
    text = capsys.readouterr().out
    assert "--template 'Please call {{ name }}" in text
    assert "espeak-ng:VOICE" in text
