import errno
import json
import threading

import numpy as np
import pytest

from ultravox.audio.waveform import write_waveform
from ultravox.data.cache import CacheKey, FeatureCache, FeatureRequest
from ultravox.errors import AudioError, DataError, UltravoxError

KEY = CacheKey(encoder_hash="abc", preprocessing="log-mel-1", num_channels=3)


class Encoder:
    """Frames of 10 ms: mean, peak and a ramp. Counts its calls."""

    def __init__(self):
        self.calls, self.num_waveforms = 0, 0

    def __call__(self, waveforms):
        self.calls += 1
        self.num_waveforms += len(waveforms)
        return [self.one(waveform) for waveform in waveforms]

    @staticmethod
    def one(waveform):
        blocks = np.array_split(waveform, max(1, len(waveform) // 160))
        return np.array([[b.mean(), np.abs(b).max(), i / 100] for i, b in enumerate(blocks)], dtype=np.float32)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ULTRAVOX_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def requests(tmp_path):
    found = []
    for index in range(8):
        seconds = 0.2 + 0.1 * index
        time = np.arange(int(16000 * seconds)) / 16000
        path = tmp_path / f"tone-{index}.wav"
        write_waveform(path, (0.3 * np.sin(2 * np.pi * (200 + 50 * index) * time)).astype(np.float32))
        found += [FeatureRequest(path, seconds, speed) for speed in (1.0, 1.1)]
    return found


def shard(home):
    return next(home.glob("features/*/shard.bin"))


def test_second_use_runs_the_encoder_not_once(home, requests):
    encoder = Encoder()
    report = FeatureCache(KEY).build(requests, encoder, max_batch_seconds=1.0)
    assert encoder.num_waveforms == report.num_encoded == 16
    assert 1 < encoder.calls == report.num_encoder_calls < 16, "in batches, but not of everything at once"
    again = Encoder()
    report = FeatureCache(KEY).build(requests, again)
    assert again.calls == report.num_encoder_calls == 0


def test_frames_are_those_of_the_clip_and_not_copied(home, requests):
    from ultravox.audio.waveform import change_speed, load_waveform

    cache = FeatureCache(KEY)
    names = cache.build(requests, Encoder()).names
    assert len(set(names)) == 16
    for request, name in zip(requests, names, strict=True):
        waveform = load_waveform(request.audio)
        expected = Encoder.one(change_speed(waveform, request.speed) if request.speed != 1 else waveform)
        assert cache.num_frames(name) == len(expected)
        np.testing.assert_allclose(cache.frames(name), expected, atol=1e-3)
        assert cache.frames(name).base is not None
        assert not cache.frames(name).flags.writeable


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


def test_damaged_rows_are_made_again(home, requests):
    names = FeatureCache(KEY).build(requests, Encoder()).names
    content = bytearray(shard(home).read_bytes())
    content[5] ^= 0xFF
    shard(home).write_bytes(content)
    encoder, cache = Encoder(), FeatureCache(KEY)
    assert cache.build(requests, encoder).names == names
    assert encoder.num_waveforms == 1
    assert all(np.isfinite(cache.frames(name)).all() for name in names)


def test_truncated_shard_and_broken_index_are_made_again(home, requests):
    FeatureCache(KEY).build(requests, Encoder())
    content = shard(home).read_bytes()
    shard(home).write_bytes(content[: len(content) // 2])
    encoder = Encoder()
    FeatureCache(KEY).build(requests, encoder)
    assert 0 < encoder.num_waveforms < 16
    (shard(home).parent / "index.json").write_text('{"version": 1, "ent')
    encoder, cache = Encoder(), FeatureCache(KEY)
    names = cache.build(requests, encoder).names
    assert encoder.num_waveforms == 16
    np.testing.assert_allclose(cache.frames(names[0])[:, 2], np.arange(len(cache.frames(names[0]))) / 100, atol=1e-3)


def test_index_of_another_format_is_not_mixed_in(home, requests):
    FeatureCache(KEY).build(requests, Encoder())
    path = shard(home).parent / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    encoder = Encoder()
    FeatureCache(KEY).build(requests, encoder)
    assert encoder.num_waveforms == 16


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


def test_two_builders_at_once_share_the_work(home, requests):
    encoders = [Encoder(), Encoder()]
    names: list = [None, None]

    def build(index):
        names[index] = FeatureCache(KEY).build(requests, encoders[index], max_batch_seconds=0.5).names

    threads = [threading.Thread(target=build, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert names[0] == names[1]
    assert sorted(encoder.num_waveforms for encoder in encoders) == [0, 16]


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
        "missing": 1,
    }
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


def test_an_index_that_does_not_know_lengths_goes_by_the_manifest(home, requests):
    names = FeatureCache(KEY).build(requests, Encoder()).names
    path = shard(home).parent / "index.json"
    index = json.loads(path.read_text())
    del index["num_samples"]
    path.write_text(json.dumps(index))
    encoder = Encoder()
    report = FeatureCache(KEY).build(requests, encoder, min_seconds=0.25)
    assert encoder.calls == 0
    assert report.names == [None, None, *names[2:]]


def test_a_full_disk_leaves_no_rows_that_no_index_names(home, requests, monkeypatch):
    class FullDisk(Encoder):
        def __call__(self, waveforms):
            if self.calls == 2:
                raise OSError(errno.ENOSPC, "no space left on device")
            return super().__call__(waveforms)

    cache = FeatureCache(KEY)
    with pytest.raises(UltravoxError, match="disk full"):
        cache.build(requests, FullDisk(), max_batch_seconds=1.0)
    assert shard(home).stat().st_size == 0
    again = Encoder()
    names = cache.build(requests, again).names
    assert again.num_waveforms == 16
    assert all(cache.num_frames(name) == len(cache.frames(name)) for name in names)
    monkeypatch.setattr("ultravox.data.cache.SECONDS_BETWEEN_COMMITS", -1.0)
    faster = [FeatureRequest(request.audio, request.seconds, request.speed + 0.5) for request in requests]
    with pytest.raises(UltravoxError, match="disk full"):
        cache.build(faster, FullDisk(), max_batch_seconds=1.0)
    index = json.loads((shard(home).parent / "index.json").read_text())
    assert 16 < len(index["entries"]) < 32, "what was indexed on the way stays"
    assert shard(home).stat().st_size == index["num_rows"] * 3 * 2


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
