"""The feature cache in one process: what it encodes, what it gives back, what it makes again."""

import errno
import multiprocessing
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cache_parts import KEY, Encoder, assert_right, write_tones

from ultravox.audio.waveform import write_waveform
from ultravox.data.cache import CacheKey, FeatureCache, FeatureRequest
from ultravox.data.cache_shards import Shard, find_shards, hash_name
from ultravox.errors import AudioError, DataError, UltravoxError


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ULTRAVOX_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def requests(tmp_path):
    return write_tones(tmp_path)


def shards(key=KEY):
    return find_shards(key.folder())


def flip_byte(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)


def test_second_use_runs_the_encoder_not_once(home, requests):
    encoder = Encoder()
    report = FeatureCache(KEY).build(requests, encoder, max_batch_seconds=1.0)
    assert encoder.num_waveforms == report.num_encoded == 16
    assert 1 < encoder.calls == report.num_encoder_calls < 16, "in batches, but not of everything at once"
    again = Encoder()
    report = FeatureCache(KEY).build(requests, again)
    assert again.calls == report.num_encoder_calls == 0


def test_frames_are_those_of_the_clip_and_not_copied(home, requests):
    cache = FeatureCache(KEY)
    names = cache.build(requests, Encoder()).names
    assert len(set(names)) == 16
    assert_right(cache, requests, names)
    for name in names:
        assert name in cache
        assert cache.frames(name).base is not None
        assert not cache.frames(name).flags.writeable
    assert "other@1" not in cache
    with pytest.raises(KeyError, match="other@1"):
        cache.frames("other@1")


def test_float32_when_asked(home, requests):
    cache = FeatureCache(CacheKey("abc", "log-mel-1", 3, dtype="float32"))
    names = cache.build(requests[:1], Encoder()).names
    assert cache.frames(names[0]).dtype == np.float32


def test_only_what_is_new_is_encoded_and_what_was_there_stays(home, requests):
    cache = FeatureCache(KEY)
    names = cache.build(requests[:6], Encoder()).names
    before = [cache.frames(name).copy() for name in names]
    encoder = Encoder()
    cache.build(requests, encoder)
    assert encoder.num_waveforms == 10
    for name, frames in zip(names, before, strict=True):
        assert np.array_equal(cache.frames(name), frames)


def test_other_weights_preprocessing_or_dtype_have_their_own_cache(home, requests):
    keys = [
        KEY,
        CacheKey("abd", "log-mel-1", 3),
        CacheKey("abc", "log-mel-2", 3),
        CacheKey("abc", "log-mel-1", 3, "float32"),
    ]
    for key in keys:
        encoder = Encoder()
        FeatureCache(key).build(requests[:2], encoder)
        assert encoder.num_waveforms == 2
    assert len({key.folder() for key in keys}) == 4


def test_the_key_is_the_content_not_the_name(home, requests, tmp_path):
    FeatureCache(KEY).build(requests, Encoder())
    moved = tmp_path / "elsewhere.wav"
    moved.write_bytes(requests[0].audio.read_bytes())
    encoder = Encoder()
    FeatureCache(KEY).build([FeatureRequest(moved, 0.2)], encoder)
    assert encoder.calls == 0
    write_waveform(requests[0].audio, np.full(4000, 0.1, dtype=np.float32))
    FeatureCache(KEY).build(requests[:1], encoder)
    assert encoder.calls == 1


def test_damaged_rows_are_made_again_and_once(home, requests):
    names = FeatureCache(KEY).build(requests, Encoder()).names
    flip_byte(shards()[0].data, 5)
    encoder, cache = Encoder(), FeatureCache(KEY)
    assert cache.build(requests, encoder).names == names
    assert encoder.num_waveforms == 1
    assert_right(cache, requests, names)
    encoder = Encoder()
    FeatureCache(KEY).build(requests, encoder)
    assert encoder.calls == 0


def test_damage_that_leaves_no_trace_is_found_when_it_is_read(home, requests):
    names = FeatureCache(KEY).build(requests, Encoder()).names
    data = shards()[0].data
    before = data.stat()
    flip_byte(data, 5)
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
    encoder, cache = Encoder(), FeatureCache(KEY)
    cache.build(requests, encoder)
    assert encoder.calls == 0, "nothing tells yet"
    [entry] = [entry for entry in shards()[0].entries(KEY.id).tolist() if entry[1] == 0]
    [bad] = [name for name in names if hash_name(name) == entry[0]]
    with pytest.raises(DataError, match="are damaged: start again"):
        cache.frames(bad)
    assert all(len(cache.frames(name)) for name in names if name != bad)
    cache = FeatureCache(KEY)
    cache.build(requests, encoder)
    assert encoder.num_waveforms == 1
    assert_right(cache, requests, names)


def test_a_truncated_shard_is_made_again_and_never_gone_on_with(home, requests):
    FeatureCache(KEY).build(requests, Encoder())
    [first] = shards()
    content = first.data.read_bytes()
    first.data.write_bytes(content[: len(content) // 2])
    encoder, cache = Encoder(), FeatureCache(KEY)
    names = cache.build(requests, encoder).names
    assert 0 < encoder.num_waveforms < 16
    assert_right(cache, requests, names)
    assert first.data.read_bytes() == content[: len(content) // 2], "who has it open still sees the rows that were left"
    assert [shard.number for shard in shards()] == [1, 2]


@pytest.mark.parametrize("damage", ["cut", "flipped", "absent", "version", "key"])
def test_an_index_that_does_not_fit_is_not_mixed_in(home, requests, damage):
    FeatureCache(KEY).build(requests, Encoder())
    [shard] = shards()
    index = shard.index.read_bytes()
    if damage == "cut":
        shard.index.write_bytes(index[:-7])
    elif damage == "flipped":
        flip_byte(shard.index, 60)
    elif damage == "absent":
        shard.index.unlink()
    elif damage == "version":
        flip_byte(shard.index, 8)
    else:
        shard.write_entries(CacheKey("abd", "log-mel-1", 3).id, shard.entries(KEY.id))
    encoder, cache = Encoder(), FeatureCache(KEY)
    names = cache.build(requests, encoder).names
    assert encoder.num_waveforms == 16
    assert_right(cache, requests, names)
    assert len(list(KEY.folder().glob("*.bin"))) == 1, "what cannot be used is gone"


@pytest.mark.parametrize(("old", "new"), [('"version": 2', '"version": 3'), ('"abc"', '"abd"')])
def test_a_folder_of_another_version_or_key_is_refused(home, requests, old, new):
    FeatureCache(KEY).build(requests, Encoder())
    said = KEY.folder() / "key.json"
    said.write_text(said.read_text().replace(old, new))
    with pytest.raises(DataError, match=rf"data cache clear --key {KEY.id}"):
        FeatureCache(KEY).build(requests, Encoder())
    said.write_text("{")
    encoder = Encoder()
    FeatureCache(KEY).build(requests, encoder)
    assert encoder.calls == 0
    assert f'"{KEY.encoder_hash}"' in said.read_text()


def test_shards_are_of_bounded_size_and_all_are_read(home, requests):
    cache = FeatureCache(KEY, shard_bytes=1000)
    names = cache.build(requests, Encoder()).names
    assert len(shards()) > 4
    longest = max(cache.frames(name).nbytes for name in names)
    assert all(shard.num_bytes(shard.data) <= max(1000, longest) for shard in shards())
    reader = FeatureCache(KEY)
    assert_right(reader, requests, names)
    flip_byte(shards()[2].data, 9)
    encoder, cache = Encoder(), FeatureCache(KEY, shard_bytes=1000)
    assert_right(cache, requests, cache.build(requests, encoder).names)
    assert encoder.num_waveforms == 1


def test_small_builds_go_into_one_shard(home, requests):
    for request in requests:
        FeatureCache(KEY).build([request], Encoder())
    assert len(shards()) == 1
    assert len(shards()[0].entries(KEY.id)) == 16
    cache = FeatureCache(KEY)
    assert_right(cache, requests, cache.build(requests, Encoder()).names)


def test_a_shard_is_read_whole_only_when_it_has_changed(home, requests, monkeypatch):
    FeatureCache(KEY).build(requests, Encoder())
    looks = []
    whole = Shard.whole
    monkeypatch.setattr(Shard, "whole", lambda self, *args: looks.append(self.number) or whole(self, *args))
    FeatureCache(KEY).build(requests, Encoder())
    assert looks == []
    os.utime(shards()[0].data)
    for _ in range(2):
        FeatureCache(KEY).build(requests, Encoder())
    assert looks == [1]


def _read_in_child(cache, names, queue):
    queue.put([cache.frames(name).tobytes() for name in names])


def test_forked_and_pickled_workers_read_the_same(home, requests):
    cache = FeatureCache(KEY)
    names = cache.build(requests, Encoder()).names
    expected = [cache.frames(name).tobytes() for name in names]
    fork = multiprocessing.get_context("fork")
    queue = fork.SimpleQueue()
    worker = fork.Process(target=_read_in_child, args=(cache, names, queue))
    worker.start()
    assert queue.get() == expected
    worker.join(timeout=30)
    pickled = pickle.dumps(cache)
    assert len(pickled) < 1000, "not the index, which each process reads for itself"
    script = (
        f"import pickle; cache = pickle.loads({pickled!r})\nfor n in {names}: print(cache.frames(n).tobytes().hex())"
    )
    environment = {**os.environ, "ULTRAVOX_HOME": "elsewhere"}  # the folder travels too
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert [bytes.fromhex(line) for line in done.stdout.splitlines()] == expected, done.stderr


def test_an_interrupted_build_leaves_nothing_half(home, requests):
    class Killed(Encoder):
        def __call__(self, waveforms):
            if self.calls == 2:
                raise KeyboardInterrupt
            return super().__call__(waveforms)

    with pytest.raises(KeyboardInterrupt):
        FeatureCache(KEY).build(requests, Killed(), max_batch_seconds=1.0)
    cache = FeatureCache(KEY)
    names = cache.build(requests, Encoder()).names
    assert all(np.allclose(cache.frames(n)[:, 2] * 100, np.arange(cache.num_frames(n)), atol=0.1) for n in names)


def test_bad_clips_are_counted_by_reason_and_too_many_stop_the_run(home, requests, tmp_path):
    (tmp_path / "noise.wav").write_bytes(b"this is not audio" * 100)
    (tmp_path / "empty.wav").write_bytes(b"")
    write_waveform(tmp_path / "short.wav", np.full(100, 0.1, dtype=np.float32))
    bad = [FeatureRequest(tmp_path / name, 1.0, 1.0) for name in ["noise.wav", "empty.wav", "short.wav", "absent.wav"]]
    bad.append(FeatureRequest(tmp_path / "noise.wav", 1.0, 0.9))
    report = FeatureCache(KEY).build(requests + bad, Encoder(), min_seconds=0.1)
    assert {reason: len(files) for reason, files in report.quarantined.items()} == {
        "not readable as audio": 1,
        "empty": 1,
        "too short": 1,
        "missing audio": 1,
    }
    assert report.quarantine.counts() == {reason: len(files) for reason, files in report.quarantined.items()}
    assert report.names[-5:] == [None] * 5
    assert None not in report.names[:16]
    report.require(max_share=0.25, num_clips=12)  # the short one is no fault
    with pytest.raises(DataError, match=r"3 of 12 clips.*1 empty.*max_quarantine_share = 0.01"):
        report.require(max_share=0.01, num_clips=12)


def test_too_long_is_its_own_reason(home, requests):
    report = FeatureCache(KEY).build(requests[-1:], Encoder(), max_seconds=0.5)
    assert list(report.quarantined) == ["too long"]


def test_length_limits_hold_for_what_is_cached_already(home, requests):
    FeatureCache(KEY).build(requests, Encoder())
    lying = [FeatureRequest(request.audio, 0.5, request.speed) for request in requests]  # they last 0.2 to 0.9 s
    for asked in (requests, lying):
        encoder = Encoder()
        report = FeatureCache(KEY).build(asked, encoder, min_seconds=0.25, max_seconds=0.85)
        assert encoder.calls == 0
        assert {reason: len(files) for reason, files in report.quarantined.items()} == {"too short": 1, "too long": 1}
        assert report.names[:2] == report.names[-2:] == [None, None]
        assert None not in report.names[2:-2]


def test_a_full_disk_leaves_no_rows_that_no_index_names(home, requests, monkeypatch):
    class FullDisk(Encoder):
        def __call__(self, waveforms):
            if self.calls == 2:
                raise OSError(errno.ENOSPC, "no space left on device")
            return super().__call__(waveforms)

    cache = FeatureCache(KEY)
    with pytest.raises(UltravoxError, match="disk full"):
        cache.build(requests, FullDisk(), max_batch_seconds=1.0)
    assert shards() == []
    again = Encoder()
    names = cache.build(requests, again).names
    assert again.num_waveforms == 16
    assert_right(cache, requests, names)
    monkeypatch.setattr("ultravox.data.cache_shards.SECONDS_BETWEEN_COMMITS", -1.0)
    faster = [replace(request, speed=request.speed + 0.5) for request in requests]
    with pytest.raises(UltravoxError, match="disk full"):
        cache.build(faster, FullDisk(), max_batch_seconds=1.0)
    [shard] = shards()
    entries = shard.entries(KEY.id)
    assert 16 < len(entries) < 32, "what was indexed on the way stays"
    assert shard.data.stat().st_size == entries["rows"].sum() * KEY.row_bytes


def test_frames_that_do_not_fit_are_refused(home, requests):
    with pytest.raises(DataError, match=r"expected \[frame, 3\]"):
        FeatureCache(KEY).build(requests, lambda waveforms: [np.zeros((4, 2), np.float32)] * len(waveforms))
    with pytest.raises(DataError, match="feature_dtype: float32"):
        FeatureCache(KEY).build(requests, lambda waveforms: [np.full((4, 3), 1e6, np.float32)] * len(waveforms))


def test_progress_ends_at_the_total(home, requests):
    seen = []
    FeatureCache(KEY).build(requests, Encoder(), max_batch_seconds=1.0, on_progress=lambda *pair: seen.append(pair))
    assert seen == sorted(seen)
    assert seen[-1][0] == pytest.approx(seen[-1][1])


def test_errors_of_the_encoder_are_not_hidden(home, requests):
    def broken(waveforms):
        raise AudioError("boom")

    with pytest.raises(AudioError, match="boom"):
        FeatureCache(KEY).build(requests, broken)
