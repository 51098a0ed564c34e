"""A prepared dataset holds what the source held, whoever builds it and however often it is interrupted."""

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ultravox.audio.content import NO_AUDIO
from ultravox.audio.waveform import load_waveform
from ultravox.data.clip import Clip, RowFault
from ultravox.data.prepare import prepare_dataset
from ultravox.data.prepared import iter_prepared, verify
from ultravox.data.shard import RowOptions, is_plain_flac, store
from ultravox.data.sharding import PrepareOptions
from ultravox.errors import AudioError, DataError, UltravoxError

THREE_SHARDS = PrepareOptions(shards_multiple_of=3)


def noise(num_samples, channels=1, seed=0):
    samples = np.random.default_rng(seed).integers(-9000, 9000, (num_samples, channels))
    return samples.astype(np.int16)


@pytest.fixture
def make_clips(tmp_path):
    """`make_clips(count)` → clips of 0.2 to 0.4 s, FLAC at 16 kHz."""
    folder = tmp_path / "audio"
    folder.mkdir()

    def make(count=12):
        clips = []
        for index in range(count):
            path = folder / f"{index}.flac"
            num_samples = 3200 + 250 * (index % 13)
            soundfile.write(path, noise(num_samples, seed=index), 16000)
            clips.append(Clip(f"clip-{index}", path, f"text {index}", num_samples / 16000, licence="CC0-1.0"))
        return clips

    return make


def contents(folder):
    """Every file of a folder: name → hash."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def run(output, clips, options=THREE_SHARDS, **more):
    return prepare_dataset(output, {"train": lambda: iter(clips)}, options, **more)


# What goes in comes out


def test_rows_come_back_as_they_were(make_clips, tmp_path):
    clips = make_clips(8)
    formats = {"a.wav": (16000, 1), "b.wav": (8000, 2), "c.ogg": (44100, 1), "d.flac": (16000, 2)}
    for index, (name, (rate, channels)) in enumerate(formats.items()):
        soundfile.write(tmp_path / name, noise(rate // 2, channels, seed=index), rate)
        clips.append(Clip(name, tmp_path / name, f"said in {name}", 0.5, speaker="ann", language="en"))
    clips[1] = replace(clips[1], answer="yes", columns={"topic": "tëa", "turns": 3}, text="")
    turns = ({"role": "user", "content": "<|audio|> and <|audio|>"}, {"role": "assistant", "content": "two"})
    clips[2] = replace(clips[2], messages=turns, more_audio=((clips[3].audio, 1.0), (tmp_path / "b.wav", 0.5)))
    clips.append(Clip("words", NO_AUDIO, "a text alone", 0.0))
    counted = []
    run(tmp_path / "out", clips, count_tokens=lambda texts: [counted.append(text) or len(text) for text in texts])

    found = list(iter_prepared(tmp_path / "out", "train"))
    assert [clip.id for clip in found] == [clip.id for clip in clips]
    for clip, before in zip(found, clips, strict=True):
        for field in ("text", "speaker", "licence", "language", "answer", "columns", "messages"):
            assert getattr(clip, field) == getattr(before, field)
        if before.audio is NO_AUDIO:
            assert clip.audio is NO_AUDIO
            continue
        waveform = load_waveform(before.audio)
        assert clip.duration == len(waveform) / 16000
        stored, rate = soundfile.read(__import__("io").BytesIO(clip.audio.read()), dtype="int16", always_2d=True)
        assert (rate, stored.shape) == (16000, (len(waveform), 1))
        assert np.abs(stored[:, 0] / 32768 - np.clip(waveform, -1, 1)).max() <= 0.5 / 32768 + 1e-6
    assert found[0].audio.read() == clips[0].audio.read_bytes(), "16-bit FLAC at 16 kHz stays as it is"
    assert found[8].audio.read()[:4] == b"fLaC"
    assert np.array_equal(load_waveform(found[8].audio), load_waveform(clips[8].audio)), "16 bits lose nothing"
    (first, seconds), (second, half) = found[2].more_audio
    assert first.read() == clips[3].audio.read_bytes()
    assert seconds == clips[3].duration, "what was measured, not what the row said"
    assert np.allclose(load_waveform(second), load_waveform(tmp_path / "b.wav"), atol=1 / 32768)
    assert half == 0.5
    assert sorted(counted) == sorted(clip.text for clip in clips)
    verify(tmp_path / "out")


def test_the_original_bytes_are_kept_on_request(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(24000, 2), 48000)
    clip = Clip("a", tmp_path / "a.wav", "hello", 9.0)
    run(tmp_path / "out", [clip], PrepareOptions(RowOptions(keep_original=True)))
    (found,) = iter_prepared(tmp_path / "out", "train")
    assert found.audio.read() == clip.audio.read_bytes()
    assert (found.audio.suffix, found.duration) == (".wav", 0.5)
    assert len(load_waveform(found.audio)) == 8000


@pytest.mark.parametrize(
    ("rate", "channels", "subtype", "format"),
    [(8000, 1, "PCM_16", "FLAC"), (16000, 2, "PCM_16", "FLAC"), (16000, 1, "PCM_24", "FLAC"), (16000, 1, None, "WAV")],
)
def test_only_one_kind_of_flac_is_taken_as_it_is(rate, channels, subtype, format, tmp_path):
    soundfile.write(tmp_path / "a", noise(1000, channels), rate, subtype, format=format)
    assert not is_plain_flac((tmp_path / "a").read_bytes())
    soundfile.write(tmp_path / "b", noise(1234), 16000, format="FLAC")
    content = (tmp_path / "b").read_bytes()
    assert is_plain_flac(content)
    assert not is_plain_flac(content[:20])
    assert not is_plain_flac(b"")


@pytest.mark.parametrize("num_samples", [16000, 70000])
def test_flac_that_holds_less_than_it_declares_is_truncated(num_samples, tmp_path):
    """As when it was cut between two of its frames, by less than a header may be wrong in other formats."""
    path = tmp_path / "a.flac"
    soundfile.write(path, noise(num_samples), 16000)
    content = bytearray(path.read_bytes())
    content[18:26] = (int.from_bytes(content[18:26], "big") + 800).to_bytes(8, "big")
    path.write_bytes(content)
    with pytest.raises(AudioError, match="damaged or truncated"):
        store(path, RowOptions())


def test_shards_are_consecutive_even_and_no_larger_than_asked_for(tmp_path):
    clips = []
    for index in range(30):
        seconds = 1 if index < 20 else 6
        soundfile.write(tmp_path / f"{index}.flac", noise(seconds * 16000, seed=index), 16000)
        clips.append(Clip(str(index), tmp_path / f"{index}.flac", "words", float(seconds)))
    info = run(tmp_path / "out", clips, PrepareOptions(shards_multiple_of=4, max_shard_mb=1)).info
    shards = info["splits"]["train"]["shards"]
    assert len(shards) == 4
    assert max(shard["num_bytes"] for shard in shards) < 1 << 20
    assert min(shard["num_bytes"] for shard in shards) > 0.5 * max(shard["num_bytes"] for shard in shards)
    assert [clip.id for clip in iter_prepared(tmp_path / "out", "train")] == [clip.id for clip in clips]
    big = run(tmp_path / "big", clips * 1, PrepareOptions(shards_multiple_of=1, max_shard_mb=2)).info
    assert len(big["splits"]["train"]["shards"]) == 2
    with pytest.raises(DataError, match=r"a row of split 'train' may take 1\.2 MB, .* at most 1 MB: raise"):
        run(tmp_path / "no", [replace(clips[0], duration=40.0)], PrepareOptions(max_shard_mb=1))
    assert not list(tmp_path.glob("no*"))


# The same bytes


def test_processes_and_ray_make_the_same_bytes(make_clips, tmp_path):
    clips = make_clips()
    run(tmp_path / "one", clips)
    run(tmp_path / "two", clips, workers=2)
    run(tmp_path / "ray", clips, workers=2, engine="ray")
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "ray")
    assert len([name for name in contents(tmp_path / "one") if name.startswith("data/")]) == 3


def test_a_fault_in_a_worker_of_ray_is_told_as_it_is(make_clips, tmp_path, monkeypatch):
    """Ray's own wrapping, which has the traceback in its text, is taken off."""
    ray = pytest.importorskip("ray")
    full = UltravoxError("disk full while writing x")
    wrapped = ray.exceptions.RayTaskError("build_shard", "a long traceback", full).as_instanceof_cause()

    def get(_):
        raise wrapped

    remote = type("Remote", (), {"remote": staticmethod(lambda task: task)})
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "remote", lambda **_: lambda function: remote)
    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(UltravoxError) as caught:
        run(tmp_path / "out", make_clips(3), engine="ray")
    assert str(caught.value) == "disk full while writing x"


def test_a_clip_does_not_depend_on_the_name_of_its_file(make_clips, tmp_path):
    clips = make_clips(4)
    run(tmp_path / "one", clips)
    moved = []
    for clip in clips:
        path = tmp_path / f"moved-{clip.audio.name}"
        shutil.copy(clip.audio, path)
        moved.append(replace(clip, audio=path))
    run(tmp_path / "two", moved)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


# Interruptions


class KillAt:
    """Kills its own process, as `kill -9` does, before the n-th change to the disk."""

    def __init__(self, number):
        self.left = number
        for name in ("replace", "fsync", "unlink", "rmdir"):
            setattr(os, name, self.before(getattr(os, name)))

    def before(self, function):
        def changed(*args, **kwargs):
            self.left -= 1
            if self.left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return changed


def killed_at(number, work) -> bool:
    """Run `work` in a fork that is killed before its n-th change to the disk; whether it came to that."""
    child = os.fork()
    if not child:
        try:
            KillAt(number)
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.fixture
def no_waiting(monkeypatch):
    """The process is killed, the machine is not: what was written is there without waiting for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def test_killed_at_any_write_the_same_command_ends_in_the_same_bytes(make_clips, tmp_path, no_waiting):
    clips = make_clips(6)
    run(tmp_path / "whole", clips)
    expected = contents(tmp_path / "whole")
    output = tmp_path / "out"
    for number in range(200):
        again = killed_at(number, lambda: run(output, clips))
        if output.exists():
            assert contents(output) == expected, "under its own name it is whole"
        kept = len(list(tmp_path.glob("out.partial/work/*.json")))
        done = run(output, clips)
        assert contents(output) == expected
        assert done.num_built == (0 if kept == 3 or not again else 3 - kept) or number > 15
        assert not list(tmp_path.glob("out.partial"))
        shutil.rmtree(output)
        if not again:
            break
    assert 15 < number < 199


def test_killed_while_an_older_one_is_replaced(make_clips, tmp_path, no_waiting):
    clips = make_clips(2)
    new = [replace(clip, text="new") for clip in clips]
    run(tmp_path / "old", clips)
    run(tmp_path / "new", new)
    output = tmp_path / "out"
    states = set()
    for number in range(200):
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(tmp_path / "old", output)
        again = killed_at(number, lambda: run(output, new, overwrite=True))
        states.add(next(iter_prepared(output, "train")).text if output.exists() else None)
        run(output, new, overwrite=True)
        assert contents(output) == contents(tmp_path / "new")
        if not again:
            break
    assert states == {"text 0", None, "new"}


def test_a_finished_shard_is_kept_only_when_it_is_the_same(make_clips, tmp_path):
    clips = make_clips(9)
    output, partial = tmp_path / "out", tmp_path / "out.partial"

    def stop(done, total):
        if done == total:
            raise KeyboardInterrupt

    def interrupt():
        with pytest.raises(KeyboardInterrupt):
            run(output, clips, on_progress=stop)
        assert len(list(partial.glob("work/*.json"))) == 3
        assert not output.exists()

    interrupt()
    (partial / "data" / ".half").write_bytes(b"half of a shard")
    shard = partial / "data" / "train-00001-of-00003.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert run(output, clips).num_built == 1, "a damaged one is built again"
    expected = contents(output)
    shutil.rmtree(output)

    interrupt()
    (partial / "work" / "train-00002.json").write_text('{"digest": "')
    assert run(output, clips).num_built == 1, "one whose report is half-written too"
    assert contents(output) == expected
    shutil.rmtree(output)

    interrupt()
    path = clips[0].audio
    soundfile.write(path, noise(4000, seed=99), 16000)
    assert run(output, clips).num_built == 1, "and one whose audio was replaced"
    assert next(iter_prepared(output, "train")).audio.read() == path.read_bytes()
    shutil.rmtree(output)

    interrupt()
    clips[-1] = replace(clips[-1], text="corrected")
    assert run(output, clips).num_built == 1, "and one whose text was corrected"
    shutil.rmtree(output)

    interrupt()
    assert run(output, clips, replace(THREE_SHARDS, rows=RowOptions(min_seconds=0.2))).num_built == 3


def test_a_killed_worker_ends_the_run_and_the_next_one_goes_on(make_clips, tmp_path):
    clips = make_clips(24)
    options = PrepareOptions(shards_multiple_of=24)
    run(tmp_path / "whole", clips, options)

    def kill(done, total):
        if done == 2:
            multiprocessing.active_children()[0].kill()

    with pytest.raises(DataError, match=r"a worker process was killed, .* run the same command again"):
        run(tmp_path / "out", clips, options, workers=2, on_progress=kill)
    assert not (tmp_path / "out").exists()
    assert run(tmp_path / "out", clips, options).num_built <= 22
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_full_disk_is_said_and_finished_shards_stay(make_clips, tmp_path, monkeypatch):
    clips, fsync, left = make_clips(6), os.fsync, [3]

    def full(descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UltravoxError, match=r"disk full while writing .*train-00001-of-00003\.parquet"):
        run(tmp_path / "out", clips)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob(".train*"))
    monkeypatch.setattr(os, "fsync", fsync)
    assert run(tmp_path / "out", clips).num_built == 2


# Other datasets in the place


def test_two_at_once_are_refused(make_clips, tmp_path):
    clips = make_clips(3)
    errors = []

    def both():
        if threading.current_thread() is threading.main_thread() and not errors:
            with pytest.raises(DataError, match=r"another process prepares .*out at this moment") as caught:
                run(tmp_path / "out", clips)
            errors.append(caught)
        return iter(clips)

    prepare_dataset(tmp_path / "out", {"train": both}, THREE_SHARDS)
    assert len(errors) == 1
    verify(tmp_path / "out")


def test_what_is_there_is_left_unless_it_is_to_be_replaced(make_clips, tmp_path):
    clips, output = make_clips(3), tmp_path / "out"
    assert run(output, clips).num_built == 3
    before = contents(output)
    assert run(output, clips).num_built == 0
    assert run(output, clips, overwrite=True).num_built == 3
    assert contents(output) == before
    other = [replace(clips[0], text="other")]
    with pytest.raises(DataError, match=r"out holds another prepared dataset: .* --overwrite"):
        run(output, other)
    assert contents(output) == before
    assert not list(tmp_path.glob("*.partial"))
    run(output, other, overwrite=True)
    assert [clip.text for clip in iter_prepared(output, "train")] == ["other"]
    assert not list(tmp_path.glob(".out*"))

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="mine is there already and is no prepared dataset"):
        run(tmp_path / "mine", clips, overwrite=True)
    assert contents(tmp_path / "mine").keys() == {"thesis.txt"}


def test_a_damaged_one_is_not_taken_for_whole(make_clips, tmp_path):
    clips, output = make_clips(3), tmp_path / "out"
    run(output, clips)
    shard = next(output.glob("data/*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=f"{shard.name} is damaged"):
        run(output, clips)
    run(output, clips, overwrite=True)
    verify(output)


# Rows that cannot be used


@pytest.fixture
def faulty(make_clips, tmp_path, write_three_hours):
    """Nine good clips, and one of each fault among them: clips, and reason → ids."""
    good = make_clips(9)
    folder = tmp_path / "faulty"
    folder.mkdir()

    def write(name, samples, rate=16000, **how):
        soundfile.write(folder / name, samples, rate, **how)
        return folder / name

    cut = write("cut.wav", noise(16000))
    cut.write_bytes(cut.read_bytes()[:-2000])
    cut_flac = write("cut.flac", noise(16000))
    cut_flac.write_bytes(cut_flac.read_bytes()[:-200])  # a few hundredths of a second
    not_a_number = noise(3200).astype(np.float32) / 32768
    not_a_number[7] = np.nan
    infinite = np.where(np.isnan(not_a_number), np.inf, not_a_number)
    write_three_hours(folder / "hours.wav")
    (folder / "empty.wav").write_bytes(b"")
    (folder / "words.wav").write_text("words and not sounds " * 20)
    audio = {
        "missing audio": [folder / "nowhere.wav"],
        "damaged or truncated": [cut, cut_flac],
        "with NaN or infinite samples": [
            write("nan.wav", not_a_number, subtype="FLOAT"),
            write("inf.wav", infinite, subtype="FLOAT"),
        ],
        "without samples": [write("zero.wav", noise(0))],
        "too short": [write("one.wav", noise(1))],
        "silent": [write("silent.wav", np.zeros(8000, np.float32))],
        "too long": [folder / "hours.wav"],
        "empty": [folder / "empty.wav"],
        "not readable as audio": [folder / "words.wav"],
    }
    bad = {reason: [Clip(path.name, path, "hello", 0.3) for path in paths] for reason, paths in audio.items()}
    bad["without text"] = [replace(good[0], id="blank", text=" \n")]
    bad["not Unicode"] = [replace(good[0], id="half", text="half \ud83d")]
    bad["id twice"] = [replace(good[0], text="again")]
    clips = list(good)
    for place, clip in enumerate(clip for group in bad.values() for clip in group):
        clips.insert(2 * place + 1, clip)
    return clips, good, {reason: [clip.id for clip in group] for reason, group in bad.items()}


@pytest.mark.parametrize("workers", [1, 2])
def test_each_fault_is_left_out_counted_and_named(faulty, workers, tmp_path):
    clips, good, bad = faulty
    info = run(tmp_path / "out", clips, workers=workers, max_quarantine_share=1.0).info
    found = list(iter_prepared(tmp_path / "out", "train"))
    assert [clip.id for clip in found] == [clip.id for clip in good]
    assert [clip.text for clip in found] == [clip.text for clip in good]
    assert info["quarantine"]["counts"] == {reason: len(ids) for reason, ids in bad.items()}
    rows = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    for reason, ids in bad.items():
        assert sorted(row["id"] for row in rows if row["reason"] == reason) == sorted(ids)
    assert all(row["split"] == "train" and row["detail"] and row["audio"] for row in rows)
    verify(tmp_path / "out")


def test_three_hours_are_refused_before_they_are_decoded(write_three_hours, make_clips, tmp_path, monkeypatch):
    write_three_hours(tmp_path / "hours.wav")
    monkeypatch.setattr(soundfile.SoundFile, "read", None)
    with pytest.raises(DataError, match="no row of split 'train' can be used"):
        run(tmp_path / "out", [Clip("hours", tmp_path / "hours.wav", "hello", 1.0)])
    assert not list(tmp_path.glob("out/*"))


def test_silence_and_short_audio_are_kept_on_request(tmp_path):
    soundfile.write(tmp_path / "silent.flac", np.zeros(800, np.float32), 16000)
    clips = [Clip("silent", tmp_path / "silent.flac", "hm", 0.05)]
    info = run(tmp_path / "out", clips, PrepareOptions(RowOptions(min_seconds=0.05, keep_silent=True))).info
    assert info["splits"]["train"]["num_rows"] == 1


def test_too_many_faults_leave_nothing_under_the_name(faulty, tmp_path):
    clips, good, bad = faulty
    num_faults = sum(len(ids) for reason, ids in bad.items() if reason not in ("too short", "too long"))
    share = num_faults / len(clips)
    with pytest.raises(
        DataError, match=r"of 23 clips cannot be used .*--max-quarantine-share = 0\.01 allows"
    ) as caught:
        run(tmp_path / "out", clips)
    assert not (tmp_path / "out").exists()
    path = Path(str(caught.value).rpartition("named in ")[2])
    assert json.loads(path.read_text().splitlines()[0])["reason"] in bad
    with pytest.raises(DataError, match=f"{num_faults} of 23"):
        run(tmp_path / "out", clips, max_quarantine_share=share - 1e-6)
    assert run(tmp_path / "out", clips, max_quarantine_share=share).num_built == 0, "all of it was built before"
    assert len(list(iter_prepared(tmp_path / "out", "train"))) == len(good)
    assert not list(tmp_path.glob("*.partial"))


def test_a_run_stops_as_soon_as_there_are_too_many_faults(make_clips, tmp_path):
    clips = make_clips(12)
    broken = [replace(clip, audio=tmp_path / "nowhere") for clip in clips[:4]] + clips[4:]
    read = []
    with pytest.raises(DataError, match="4 of 12 clips cannot be used"):
        run(tmp_path / "out", broken, on_progress=lambda done, total: read.append(done))
    assert read == [0], "one shard was built, two were not"


def test_rows_that_the_source_could_not_read_count(make_clips, tmp_path):
    clips = make_clips(3)
    fault = RowFault("bad duration", "x", "train.jsonl, line 3: 'duration' must be a number")
    rows = [*clips[:2], fault, clips[2]]
    with pytest.raises(DataError, match=r"1 of 4 clips cannot be used \(1 bad duration\).* line 3"):
        run(tmp_path / "out", rows)
    info = run(tmp_path / "out", rows, max_quarantine_share=0.25).info
    assert info["quarantine"]["counts"] == {"bad duration": 1}
    (line,) = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "reason": "bad duration",
        "split": "train",
        "id": "x",
        "audio": "",
        "detail": str(fault),
    }


def test_one_recording_under_two_ids_is_reported_across_splits(make_clips, tmp_path):
    clips = make_clips(4)
    test = [Clip("other", clips[1].audio, "text", 0.2), replace(clips[0], audio=clips[2].audio)]
    splits = {"train": lambda: iter([*clips, replace(clips[3], id="twin")]), "test": lambda: iter(test)}
    info = prepare_dataset(tmp_path / "out", splits, THREE_SHARDS).info
    rows = [json.loads(line) for line in (tmp_path / "out" / info["same_audio"]["file"]).read_text().splitlines()]
    pairs = [("train", "twin", "clip-3"), ("test", "other", "clip-1"), ("test", "clip-0", "clip-2")]
    expected = [{"split": s, "id": id, "same_as": {"split": "train", "id": same}} for s, id, same in pairs]
    assert rows == expected
    assert info["same_audio"]["num_rows"] == 3
    assert info["splits"]["test"]["num_rows"] == 2, "they are kept"


def test_a_source_that_changes_while_it_is_read_is_refused(make_clips, tmp_path):
    clips = make_clips(6)
    passes = iter([clips, clips[:5]])
    with pytest.raises(DataError, match="the source of split 'train' changed while it was read"):
        prepare_dataset(tmp_path / "out", {"train": lambda: iter(next(passes))}, THREE_SHARDS)
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="split 'train' holds no rows"):
        run(tmp_path / "out", [])
    with pytest.raises(DataError, match="named by letters, digits and _ alone, got 'a/b'"):
        prepare_dataset(tmp_path / "out", {"a/b": lambda: iter(clips)}, THREE_SHARDS)


def test_the_counter_must_count_each_text(make_clips, tmp_path):
    with pytest.raises(DataError, match="the tokenizer counted 1 texts, expected 2"):
        run(tmp_path / "out", make_clips(6), count_tokens=lambda texts: [3])


def test_memory_does_not_grow_with_the_corpus(tmp_path, no_waiting):
    """What Python holds at the most, of a corpus and of eight times of it, both of more than one shard."""

    def peak(count):
        def clips():
            return (Clip(f"row-{index}", NO_AUDIO, f"text {index}", 0.0) for index in range(count))

        tracemalloc.start()
        try:
            options = PrepareOptions(shards_multiple_of=1, max_shard_mb=1)
            info = prepare_dataset(tmp_path / str(count), {"train": clips}, options).info
            return tracemalloc.get_traced_memory()[1], len(info["splits"]["train"]["shards"])
        finally:
            tracemalloc.stop()

    peak(1)  # what is imported and kept at the first use
    (small, few), (large, many) = peak(500), peak(4000)
    assert few > 4
    assert large < small + 4096 * (many - few), "an entry of each shard is kept, and written down"
    assert 4096 * (many - few) < 70 * 3500, "3500 rows more, all kept, would be several times as much"
