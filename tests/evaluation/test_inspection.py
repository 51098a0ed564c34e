"""What an inspection finds, each fault planted once."""

import numpy as np
import pytest

from ultravox.audio.waveform import write_waveform
from ultravox.data.manifest import Clip
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
        clip("twin1", waveform=twin, duration=1.0),
        clip("twin2", waveform=twin, duration=1.0),
        clip("long", duration=3.0),
        clip("silent", waveform=np.zeros(16000, np.float32), duration=1.0),
        clip("loud", waveform=loud, duration=1.0),
        clip("fast", "a b c d e f g h " * 6, 1.5),
        clip("slow", "hm", 4.0),
        clip("letter", "a", 0.8),
    ]
    heldout = [clip("twin3", "hello there", waveform=twin, duration=1.0), clip("copy", "Shared, words!")]
    done = []
    found = inspect_splits({"train": train, "heldout": heldout}, on_progress=lambda *counts: done.append(counts))
    assert kinds(found) == [
        ("unreadable", "train", "broken"),
        ("no text", "train", "mute"),
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
    assert found.findings[2].detail == "as fine of train: Shared, words!"
    assert found.findings[3].detail == "as twin1 of train"
    assert "2.00 s of audio" in found.findings[5].detail
    assert done == [(index, 13) for index in range(1, 14)]
    assert list(found.counts()) == [kind for kind, _, _ in kinds(found)]
    assert found.to_json()["findings"][0]["id"] == "broken"


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
