"""All keys of the feature cache together: what is there, what goes, and what stays."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cache_parts import KEY, Encoder, assert_right, write_tones

from ultravox.data.cache import CacheKey, FeatureCache, SizeCap
from ultravox.data.cache_folder import clear, describe, features_bytes, features_folder, key_folders
from ultravox.data.cache_shards import find_shards
from ultravox.errors import DataError

OTHER = CacheKey("other", "log-mel-1", 3, "float32")
DAY = 86_400


@pytest.fixture
def requests(tmp_path, monkeypatch):
    monkeypatch.setenv("ULTRAVOX_HOME", str(tmp_path / "home"))
    return write_tones(tmp_path)


def build(key, requests, **options):
    """Build in small shards and let go of them; what was encoded."""
    encoder = Encoder()
    cache = FeatureCache(key, "tiny", shard_bytes=1000)
    assert_right(cache, requests, cache.build(requests, encoder, **options).names)
    return encoder.num_waveforms


def age(key, days, which=slice(None)):
    for shard in find_shards(key.folder())[which]:
        os.utime(shard.stamp, (time.time() - days * DAY,) * 2)


def write_version_1(encoder_hash="old"):
    """A folder as the first version of the format wrote it."""
    folder = features_folder() / ("1" * 32)
    folder.mkdir(parents=True)
    key = {"encoder_hash": encoder_hash, "preprocessing": "log-mel-1", "num_channels": 3, "dtype": "float16"}
    entries = {"a@1": [0, 2, 7], "b@1": [2, 1, 8]}
    index = {"version": 1, "key": key, "num_rows": 3, "entries": entries, "num_samples": [16000, None]}
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "shard.bin").write_bytes(bytes(18))
    (folder / "lock").touch()
    return folder


def test_a_key_is_described(requests):
    build(KEY, requests)
    info = describe(KEY.folder())
    assert (info.id, info.version, info.encoder, info.preprocessing) == (KEY.id, 2, "tiny", "log-mel-1")
    assert (info.num_channels, info.dtype, info.num_entries, info.in_use) == (3, "float16", 16, False)
    assert info.made_by.startswith("ultravox ")
    assert info.audio_seconds == pytest.approx(2 * sum(0.2 + 0.1 * index for index in range(8)), abs=0.01)
    assert info.num_bytes == sum(path.stat().st_size for path in KEY.folder().iterdir())
    assert abs(info.last_use - time.time()) < 60
    assert info.health == "not checked"
    assert describe(KEY.folder(), verify=True).health == "whole"


def test_damage_that_is_found_is_mended_by_the_next_run(requests):
    build(KEY, requests)
    first, second = find_shards(KEY.folder())[:2]
    before = first.data.stat()
    content = bytearray(first.data.read_bytes())
    content[3] ^= 1
    first.data.write_bytes(content)
    os.utime(first.data, ns=(before.st_atime_ns, before.st_mtime_ns))  # so that nothing tells
    second.index.write_bytes(b"short")
    info = describe(KEY.folder(), verify=True)
    assert (info.num_damaged_entries, info.num_unreadable_shards) == (1, 1)
    assert info.health == "1 shards unreadable, 1 entries damaged"
    assert build(KEY, requests) == 1 + 16 - info.num_entries
    assert describe(KEY.folder(), verify=True).health == "whole"


def test_an_older_version_is_shown_kept_apart_and_cleared(requests):
    folder = write_version_1()
    assert build(KEY, requests) == 16
    assert key_folders() == sorted([folder, KEY.folder()])
    info = describe(folder)
    assert (info.version, info.num_entries, info.audio_seconds, info.encoder) == (1, 2, 1.0, "weights old")
    assert info.health.startswith("of older format")
    assert clear(folder.name[:4]).num_keys == 1
    assert key_folders() == [KEY.folder()]


def test_a_broken_description_costs_nothing(requests):
    build(KEY, requests)
    (KEY.folder() / "key.json").write_text("[]")
    assert "readable key.json" in describe(KEY.folder()).health
    assert build(KEY, requests) == 0
    assert describe(KEY.folder()).num_entries == 16


def test_clear_goes_by_key_and_by_age(requests):
    build(KEY, requests)
    build(OTHER, requests)
    with pytest.raises(DataError, match="no cached features have a key that begins with 'xyz'"):
        clear("xyz")
    age(KEY, 10)
    age(OTHER, 10, slice(0, 3))
    count = len(find_shards(OTHER.folder()))
    cleared = clear(OTHER.id, older_than_days=20)
    assert (cleared.num_keys, cleared.num_shards, cleared.num_bytes) == (0, 0, 0)
    before = features_bytes()
    cleared = clear(older_than_days=9)
    assert (cleared.num_keys, cleared.num_shards) == (1, 3)
    assert before - cleared.num_bytes == features_bytes()
    assert not KEY.folder().exists()
    assert len(find_shards(OTHER.folder())) == count - 3
    assert 0 < build(OTHER, requests) < 16


def test_using_features_keeps_them_young(requests):
    build(KEY, requests)
    age(KEY, 10)
    assert build(KEY, requests[:2]) == 0
    young = [shard for shard in find_shards(KEY.folder()) if shard.last_use() > time.time() - DAY]
    assert 1 <= len(young) < len(find_shards(KEY.folder()))


def test_what_a_killed_process_was_removing_goes(requests):
    build(KEY, requests)
    trash = features_folder() / ".removed.abc"
    trash.mkdir()
    (trash / "000001.bin").write_bytes(bytes(1000))
    assert clear("", older_than_days=5).num_bytes == 1000
    assert not trash.exists()


# The size limit

FPS = 100.0


def test_the_least_recently_used_makes_room(requests):
    write_version_1()
    os.utime(features_folder() / ("1" * 32) / "index.json", (time.time() - 50 * DAY,) * 2)
    build(KEY, requests)
    build(OTHER, requests[8:])
    age(KEY, 20, slice(0, 3))
    young = {shard.number for shard in find_shards(KEY.folder())[3:]}
    total = features_bytes()
    first = CacheKey("first", "log-mel-1", 3)
    assert build(first, requests[:8], cap=SizeCap(total, FPS)) == 8
    assert features_bytes() <= total
    assert not (features_folder() / ("1" * 32)).exists(), "the oldest"
    left = {shard.number for shard in find_shards(KEY.folder())}
    assert young <= left < young | {1, 2, 3}
    assert build(OTHER, requests[8:]) == 0


def test_features_of_other_data_under_the_same_key_make_room_too(requests):
    build(KEY, requests[8:])
    size = features_bytes()
    assert build(KEY, requests[:8], cap=SizeCap(size, FPS)) == 8
    assert features_bytes() <= size
    assert build(KEY, requests[:8]) == 0
    assert build(KEY, requests[8:]) > 0


def test_a_run_that_alone_needs_more_is_refused_before_it_encodes(requests):
    encoder = Encoder()
    with pytest.raises(DataError, match=r"take about .* GB, more than data\.max_cache_gb = 5e-06"):
        FeatureCache(KEY).build(requests, encoder, cap=SizeCap(5000, FPS))
    assert encoder.calls == 0


def test_what_is_in_use_stays_and_the_error_says_so(requests):
    held = FeatureCache(OTHER)
    names = held.build(requests, Encoder()).names
    encoder = Encoder()
    with pytest.raises(DataError, match="this run or other running processes use"):
        FeatureCache(KEY).build(requests[:4], encoder, cap=SizeCap(features_bytes() + 100, FPS))
    assert encoder.calls == 0
    assert_right(held, requests, names)
    del held
    assert build(KEY, requests[:4], cap=SizeCap(features_bytes() + 100, FPS)) == 4
    assert not find_shards(OTHER.folder())


def test_another_readers_shards_of_the_same_key_stay(requests):
    """It may read other clips than this run does; whether it does, only the lock of the key can tell."""
    held = FeatureCache(KEY, shard_bytes=1000)
    names = held.build(requests[8:], Encoder()).names
    encoder = Encoder()
    with pytest.raises(DataError, match="this run or other running processes use"):
        FeatureCache(KEY).build(requests[:8], encoder, cap=SizeCap(features_bytes(), FPS))
    assert encoder.calls == 0
    assert_right(FeatureCache(KEY), requests[8:], names)
    del held
    assert build(KEY, requests[:8], cap=SizeCap(features_bytes(), FPS)) == 8


def test_clips_that_are_longer_than_they_say_stay_below_the_limit_too(requests):
    from dataclasses import replace

    short = [replace(request, seconds=0.01) for request in requests]
    build(OTHER, requests)
    limit = features_bytes() + 2500
    assert build(KEY, short, cap=SizeCap(limit, FPS)) == 16
    assert features_bytes() - limit < 1000, "only what an index takes beside its rows"
    assert len(find_shards(OTHER.folder())) > 0
    clear()
    with pytest.raises(DataError, match=r"more are needed: raise data\.max_cache_gb"):
        build(KEY, short, cap=SizeCap(4000, FPS))


def test_a_run_below_the_limit_waits_for_no_builder(requests):
    from ultravox.data.cache_folder import building

    build(KEY, requests)
    with building(KEY.folder()):
        assert build(KEY, requests, cap=SizeCap(features_bytes(), FPS)) == 0
