import gzip
from pathlib import Path

import numpy as np
import pytest

from ultravox.data import asterisk
from ultravox.data.manifest import read_dataset
from ultravox.data.sources import load_clips
from ultravox.data.splits import HeldoutFilter, is_heldout, normalise_text
from ultravox.errors import DataError, NetworkError

TRANSCRIPTS = """\
; a comment

beep: [a simple beep]
silence/1: (1 second of silence)
digits/one: one
digits/two: two [with a beep] (note: short)
a1: To hear this message again, press 5.
a2: Goodbye.
a3: Hello there: welcome!
absent: This one has no sound.
"""


def tree(folder: Path) -> Path:
    """A package tree with G.722 files as Debian's packages have them."""
    import av

    (folder / asterisk.TRANSCRIPTS).parent.mkdir(parents=True)
    (folder / asterisk.TRANSCRIPTS).write_bytes(gzip.compress(TRANSCRIPTS.encode()))
    tone = (np.sin(np.arange(16000) * 2 * np.pi * 440 / 16000) * 8000).astype(np.int16)
    for name in ("beep", "silence/1", "digits/one", "digits/two", "a1", "a2", "a3"):
        path = folder / asterisk.SOUNDS / f"{name}.g722"
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w", format="g722") as container:
            stream = container.add_stream("g722", rate=16000, layout="mono")
            frame = av.AudioFrame.from_ndarray(tone[None], format="s16", layout="mono")
            frame.sample_rate = 16000
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return folder


def test_transcripts_lose_what_is_not_speech() -> None:
    found = {item.name: item.text for item in asterisk.parse_transcripts(TRANSCRIPTS)}
    assert found["beep"] == ""
    assert found["silence/1"] == ""
    assert found["digits/two"] == "two"
    assert found["a3"] == "Hello there: welcome!"
    with pytest.raises(DataError, match="line 2: expected `name: words`, got 'no colon here'"):
        asterisk.parse_transcripts("a: b\nno colon here\n")


def test_dataset_from_packages(tmp_path: Path) -> None:
    target = tmp_path / "data"
    target.mkdir()
    asterisk.build_dataset(tree(tmp_path / "tree"), target, {"package": "0" * 64})
    clips = {split: load_clips(target, split) for split in ("train", "heldout")}
    names = {clip.id for split in clips.values() for clip in split}
    assert names == {"digits-one", "digits-two", "a1", "a2", "a3"}
    assert all(is_heldout(clip.text) == (split == "heldout") for split, found in clips.items() for clip in found)
    clip = clips["train"][0]
    assert clip.duration == pytest.approx(1.0, abs=0.01)
    assert (clip.speaker, clip.licence) == ("Allison Smith", "CC-BY-SA-3.0")
    info = read_dataset(target)
    assert "Allison Smith" in info["attribution"]
    assert info["skipped"] == {"without words": ["beep", "silence/1"], "without a sound file": ["absent"]}
    waveform = asterisk.decode_g722(tmp_path / "tree" / asterisk.SOUNDS / "a1.g722")
    spectrum = np.abs(np.fft.rfft(waveform[:16000]))
    assert int(spectrum.argmax()) == pytest.approx(440, abs=2)


def test_broken_packages_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ULTRAVOX_HOME", str(tmp_path))
    monkeypatch.setattr(asterisk.shutil, "which", lambda tool: "/bin/true")

    def fail(names: list[str], folder: Path) -> dict[str, Path]:
        raise NetworkError("no network")

    monkeypatch.setattr(asterisk, "download_packages", fail)
    with pytest.raises(NetworkError):
        asterisk.fetch_asterisk_en()
    assert list((tmp_path / "data").iterdir()) == []


def test_no_network_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "apt-get").write_text("#!/bin/sh\necho \"E: Could not resolve 'archive.example.com'\" >&2\nexit 100\n")
    (tools / "dpkg-deb").write_text("#!/bin/sh\nexit 1\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setenv("ULTRAVOX_HOME", str(tmp_path / "home"))
    with pytest.raises(NetworkError, match=r"`apt-get update` failed \(E: Could not resolve .*connect to the") as error:
        asterisk.fetch_asterisk_en()
    assert "\n" not in str(error.value)
    assert [path for path in (tmp_path / "home").rglob("*") if path.is_file()] == []


def test_without_apt_a_stand_in_is_made_loudly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ULTRAVOX_HOME", str(tmp_path))
    monkeypatch.setattr(asterisk.shutil, "which", lambda tool: None)
    with pytest.raises(DataError, match="`apt-get` does not exist here: use a Debian or Ubuntu machine"):
        asterisk.fetch_asterisk_en()
    folder = asterisk.fetch_asterisk_en(lambda target: (target / "made").touch())
    assert (folder / "made").exists()
    assert "SYNTHETIC" in capsys.readouterr().err


def test_split_rule() -> None:
    assert normalise_text("  Don't PANIC -- it's 5 o'clock!\n") == "don't panic it's 5 o'clock"
    assert is_heldout("Thank you.") == is_heldout("thank  you")
    share = np.mean([is_heldout(f"sentence number {number}") for number in range(2000)])
    assert share == pytest.approx(0.2, abs=0.03)


def test_heldout_filter() -> None:
    allowed = HeldoutFilter(["Thank you.", "Please press five."]).allows
    assert not allowed("thank YOU")
    assert allowed("Thank you for calling.")  # shorter than three words: may be part of another sentence
    assert not allowed("Now please press five twice.")
    assert allowed("Please press fivefold.")


@pytest.mark.network
def test_real_prompts_split_by_text(not_fetched) -> None:
    try:
        asterisk.fetch_asterisk_en()
    except (NetworkError, DataError) as error:
        not_fetched(error)
    train, heldout = load_clips(asterisk.NAME, "train"), load_clips(asterisk.NAME, "heldout")
    assert (len(train), len(heldout)) == (442, 109)
    assert not {normalise_text(clip.text) for clip in train} & {normalise_text(clip.text) for clip in heldout}
