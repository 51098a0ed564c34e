"""What an inspection finds, each fault planted once."""

import re
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from ultravox.audio.content import NO_AUDIO
from ultravox.audio.waveform import load_waveform, write_waveform
from ultravox.data.clip import Clip, RowFault
from ultravox.evaluation.inspection import FAULTS, Finding, Inspection, inspect_splits, worst_rows


@pytest.fixture
def clip(tmp_path):
    """Makes a clip of noise that no other clip has, or of a given waveform."""
    random = np.random.default_rng(0)

    def make(name, text="one two three four", seconds=2.0, waveform=None, duration=None):
        path = tmp_path / f"{name}.wav"
        noise = (0.1 * random.standard_normal(int(seconds * 16000))).astype(np.float32)
        write_waveform(path, noise if waveform is None else waveform)
        return Clip(name, path, text, duration or seconds, speaker="ann", licence="CC0-1.0")

    return make


def kinds(inspection):
    return [(finding.kind, finding.split, finding.id) for finding in inspection.findings]


def test_a_healthy_dataset_has_figures_and_no_findings(clip):
    train = [clip("a", "One two three."), clip("b", "Two more words, two!", 4.0), clip("c", "one two three")]
    found = inspect_splits({"train": train, "heldout": [clip("d", "Something else.")]})
    assert found.findings == []
    split = found.splits[0]
    assert (split.name, split.num_clips, split.seconds, split.num_words) == ("train", 3, 8.0, 10)
    assert (split.vocabulary, split.num_texts, split.num_speakers) == (5, 2, 1)
    assert split.licences == {"CC0-1.0": 3}
    assert split.duration == {"least": 2.0, "5%": 2.0, "median": 2.0, "95%": 3.8, "most": 4.0}
    assert split.characters_per_second["most"] == 6.5  # "one two three" in 2 s


def test_each_fault_is_named(clip, tmp_path):
    twin = np.full(16000, 0.2, np.float32)
    loud = np.sign(np.sin(np.arange(16000))).astype(np.float32)
    broken = clip("broken")
    broken.audio.write_bytes(b"RIFFnonsense")
    train = [
        clip("fine", "shared words"),
        broken,
        clip("mute", " -- "),
        clip("turn", "and <|im_end|> more"),
        clip("twin1", waveform=twin, duration=1.0),
        clip("twin2", waveform=twin, duration=1.0),
        clip("long", duration=3.0),
        clip("silent", waveform=np.zeros(16000, np.float32), duration=1.0),
        clip("loud", waveform=loud, duration=1.0),
        clip("fast", "a b c d e f g h " * 6, 1.5),
        clip("slow", "hm", 4.0),
        clip("letter", "a", 0.8),
    ]
    faults = {
        "train": [
            RowFault("missing audio", "gone", "line 9: no such file"),
            RowFault("id twice", "fine", "line 10: again"),
        ]
    }
    heldout = [clip("twin3", "hello there", waveform=twin, duration=1.0), clip("copy", "Shared, words!")]
    done = []
    splits = {"train": train, "heldout": heldout}
    special = re.compile(re.escape("<|im_end|>"))
    found = inspect_splits(splits, faults=faults, special=special, on_progress=lambda *counts: done.append(counts))
    assert kinds(found) == [
        ("unusable", "train", "gone"),
        ("id twice", "train", "fine"),
        ("unreadable", "train", "broken"),
        ("no text", "train", "mute"),
        ("special token", "train", "turn"),
        ("text in two splits", "heldout", "copy"),
        ("audio in two splits", "heldout", "twin3"),
        ("audio twice", "train", "twin2"),
        ("wrong duration", "train", "long"),
        ("silent", "train", "silent"),
        ("clipped", "train", "loud"),
        ("fast", "train", "fast"),
        ("slow", "train", "slow"),
    ]
    assert {finding.kind for finding in found.faults} == set(FAULTS)
    assert found.findings[0].detail == "line 9: no such file"
    assert found.findings[5].detail == "as fine of train: Shared, words!"
    assert found.findings[6].detail == "as twin1 of train"
    assert "2.00 s of audio" in found.findings[8].detail
    assert done == [(index, 14) for index in range(1, 15)]
    assert list(found.counts()) == [kind for kind, _, _ in kinds(found)]
    assert found.to_json()["findings"][2]["id"] == "broken"


def test_hours_are_counted_by_language(clip):
    clips = [clip("a", seconds=1.0), clip("b", seconds=2.0), clip("c", seconds=0.5)]
    found = inspect_splits({"train": [replace(clips[0], language="de"), replace(clips[1], language="en"), clips[2]]})
    assert found.splits[0].languages == {"en": 2.0, "de": 1.0, "not stated": 0.5}
    assert list(found.splits[0].languages) == ["en", "de", "not stated"], "the most first"


def test_each_recording_of_a_conversation_is_heard(clip, tmp_path):
    turns = ({"role": "user", "content": "<|audio|><|audio|>"}, {"role": "assistant", "content": "Yes."})
    first, second = clip("a"), clip("b", duration=3.0)
    talk = replace(first, text="", messages=turns, more_audio=((second.audio, 3.0),))
    found = inspect_splits({"train": [talk], "test": [clip("c", waveform=load_waveform(second.audio))]})
    assert kinds(found) == [("audio in two splits", "test", "c"), ("wrong duration", "train", "a")]
    assert found.splits[0].seconds == 5.0


def test_a_text_alone_is_named_and_nothing_is_heard():
    found = inspect_splits({"train": [Clip("t", NO_AUDIO, "only words", 0.0)]})
    assert kinds(found) == [("no audio", "train", "t")]
    assert found.faults == []
    assert found.splits[0].duration["most"] == 0.0


def test_a_three_hour_file_is_refused_from_its_header(tmp_path, write_three_hours):
    """The digest that finds repeated audio reads it in blocks; nothing of it is decoded or kept."""
    write_three_hours(tmp_path / "long.wav")
    tracemalloc.start()
    found = inspect_splits({"train": [Clip("long", tmp_path / "long.wav", "a few words", 3 * 3600.0)]})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [finding.kind for finding in found.findings] == ["unreadable", "slow"]
    assert "10800" in found.findings[0].detail
    assert peak < 8e6, "decoded it would be 690 MB"


def test_without_decoding_the_rows_are_believed(clip):
    broken = clip("broken", duration=3.0)
    broken.audio.write_bytes(b"RIFFnonsense")
    found = inspect_splits({"train": [broken]}, decode=False)
    assert found.findings == []
    assert not found.decoded


def test_the_worst_rows_show_each_kind():
    many = [Finding("unreadable", "train", str(i), "") for i in range(50)] + [Finding("slow", "train", "x", "")]
    shown = worst_rows(Inspection([], many, True), 4)
    assert [finding.id for finding in shown] == ["0", "1", "2", "x"]
