"""The feature cache among several processes: real ones, of which some are killed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cache_parts import KEY, Encoder, assert_right, finish, start, wait_for, write_tones

from ultravox.data import cache_folder
from ultravox.data.cache import CacheKey, FeatureCache
from ultravox.data.cache_shards import find_shards

NUM_ENTRIES = 16


@pytest.fixture
def requests(tmp_path, monkeypatch):
    monkeypatch.setenv("ULTRAVOX_HOME", str(tmp_path / "home"))
    return write_tones(tmp_path)


@pytest.fixture
def run(tmp_path, requests):
    """Start processes that build; those that are left at the end are killed."""
    running = []

    def start_one(*options):
        running.append(start(tmp_path, tmp_path / "encoded.log", *options))
        return running[-1]

    yield start_one
    for process in running:
        process.kill()
        process.communicate(timeout=30)


def encoded(tmp_path):
    """Waveforms that all processes together have encoded."""
    log = tmp_path / "encoded.log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_two_builders_at_once_encode_everything_once(tmp_path, requests, run):
    builders = [run() for _ in range(3)]
    results = [finish(builder) for builder in builders]
    assert sorted(result["encoded"] for result in results) == [0, 0, NUM_ENTRIES]
    assert encoded(tmp_path) == NUM_ENTRIES
    assert results[0]["names"] == results[1]["names"] == results[2]["names"]
    cache, encoder = FeatureCache(KEY), Encoder()
    assert_right(cache, requests, cache.build(requests, encoder).names)
    assert encoder.calls == 0


@pytest.mark.parametrize("options", [("--commit",), ()], ids=["index written", "no index yet"])
def test_after_a_builder_is_killed_the_next_one_goes_on(tmp_path, requests, run, options):
    builder = run("--block-after", "3", *options)
    wait_for((tmp_path / "encoded.blocked").exists)
    waiting = run()  # stands before the lock
    time.sleep(0.5)
    assert waiting.poll() is None
    there = sum(len(shard.entries(KEY.id)) for shard in find_shards(KEY.folder()) if shard.index.exists())
    assert (there > 0) == bool(options)
    with next(KEY.folder().glob("*.bin")).open("ab") as file:
        file.write(b"x" * 13)  # half a row, as a process leaves it that is killed while it writes
    (KEY.folder() / ".000001.idx.abc").write_bytes(b"half")
    builder.kill()
    result = finish(waiting)
    assert result["encoded"] == NUM_ENTRIES - there
    cache, encoder = FeatureCache(KEY), Encoder()
    assert_right(cache, requests, cache.build(requests, encoder).names)
    assert encoder.calls == 0
    assert cache_folder.describe(KEY.folder(), verify=True).num_entries == NUM_ENTRIES
    left = [path.suffix for path in KEY.folder().iterdir()]
    assert (left.count(".bin"), left.count(".idx"), left.count(".abc")) == (1, 1, 0), "nothing half is left"


def test_who_waits_says_once_for_whom(tmp_path, requests, run):
    builder = run("--block-after", "3")
    wait_for((tmp_path / "encoded.blocked").exists)
    waiting = run()
    line = waiting.stderr.readline()  # comes while it waits
    assert waiting.poll() is None
    assert line.startswith(f"waiting for process {builder.pid} on ")
    assert line.endswith(f", which computes features in {KEY.folder()}\n")
    builder.kill()
    finish(waiting)
    assert waiting.stderr.closed or waiting.stderr.read() == "", "it says so once"


@pytest.mark.parametrize("damage", ["flipped", "truncated", "index"])
def test_two_processes_find_one_damage_and_it_is_mended_once(tmp_path, requests, run, damage):
    finish(run())
    (tmp_path / "encoded.log").unlink()
    [shard] = find_shards(KEY.folder())
    path = shard.index if damage == "index" else shard.data
    content = bytearray(path.read_bytes())
    content[70] ^= 1
    path.write_bytes(content[:-2] if damage == "truncated" else content)
    expected = {"flipped": 1, "truncated": 2, "index": NUM_ENTRIES}[damage]  # the flipped byte is there when cut, too
    results = [finish(process) for process in [run(), run()]]
    assert sorted(result["encoded"] for result in results) == [0, expected]
    assert encoded(tmp_path) == expected
    cache = FeatureCache(KEY)
    assert_right(cache, requests, cache.build(requests, Encoder()).names)


def test_what_a_running_process_uses_is_not_cleared(tmp_path, requests, run):
    holder = run("--hold")
    assert holder.stdout.readline()
    other = CacheKey("other", "log-mel-1", 3)
    FeatureCache(other).build(requests, Encoder())
    assert cache_folder.describe(KEY.folder()).in_use
    assert not cache_folder.describe(other.folder()).in_use
    cleared = cache_folder.clear()
    assert (cleared.num_keys, cleared.in_use) == (1, [KEY.id])
    assert not other.folder().exists()
    assert cache_folder.clear(KEY.id[:6], older_than_days=0).in_use == [KEY.id]
    assert len(find_shards(KEY.folder())) == 1
    holder.kill()  # the kernel gives the lock back
    holder.wait()
    size = cache_folder.features_bytes()
    cleared = cache_folder.clear()
    assert (cleared.num_keys, cleared.in_use) == (1, [])
    assert size - cleared.num_bytes == cache_folder.features_bytes() == 0
    assert not KEY.folder().exists()


def test_a_forked_worker_keeps_what_it_reads(tmp_path, requests):
    """Its parent may be gone: the lock belongs to the open file, which both have."""
    cache = FeatureCache(KEY)
    cache.build(requests, Encoder())
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writes)
        os.read(reads, 1)  # until the parent closes its end
        os._exit(0)
    os.close(reads)
    del cache
    assert cache_folder.clear().in_use == [KEY.id]
    os.close(writes)
    os.waitpid(child, 0)
    assert cache_folder.clear().num_keys == 1


def test_clearing_while_others_build_never_breaks_them(tmp_path, requests, run):
    """Each builder ends with all of its features, however often the folder is taken away before it holds it."""
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import pathlib, time
from cache_parts import *
requests = write_tones(pathlib.Path(sys.argv[1]), 2)
end = time.monotonic() + 1.5
while time.monotonic() < end:
    cache = FeatureCache(KEY)
    assert_right(cache, requests, cache.build(requests, Encoder()).names)
    del cache
"""
    builders = []
    for index in range(2):
        (tmp_path / str(index)).mkdir()
        command = [sys.executable, "-c", script, str(tmp_path / str(index))]
        builders.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    cleared = 0
    while any(builder.poll() is None for builder in builders):
        cleared += cache_folder.clear().num_keys
    assert [builder.communicate()[1] for builder in builders] == ["", ""]
    assert cleared > 0
