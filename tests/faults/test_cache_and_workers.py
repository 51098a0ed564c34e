"""Case 25: damaged or foreign cache shards, builders at once, processes that are killed: made again once, no hang."""

import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faulty_runs import config_for, losses_of, summary_of, write_rows, write_shards, written

from ultravox.cli.main import main
from ultravox.data.cache import FeatureCache
from ultravox.data.cache_shards import find_shards
from ultravox.data.prepare import prepare_dataset
from ultravox.data.prepared import verify
from ultravox.data.sharding import PrepareOptions
from ultravox.data.sources import load_clips
from ultravox.training.run import run_training
from ultravox.training.tune import TuneTask

SECONDS = 60  # more than any of these take; a hang would take for ever


@pytest.fixture
def own_home(tmp_path, monkeypatch):
    """A cache of this test's own, for other processes too."""
    monkeypatch.setenv("ULTRAVOX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "src"))
    return tmp_path / "home"


def cache_folder(home: Path) -> Path:
    (folder,) = [path for path in (home / "features").iterdir() if path.is_dir()]
    return folder


@pytest.fixture
def encoded(monkeypatch):
    """How many recordings each build of this process has encoded, in turn."""
    counts = []
    build = FeatureCache.build

    def counting(*args, **options):
        report = build(*args, **options)
        counts.append(report.num_encoded)
        return report

    monkeypatch.setattr(FeatureCache, "build", counting)
    return counts


def damage(folder: Path, kind: str) -> None:
    (shard,) = find_shards(folder)
    path = shard.index if kind in ("version", "index") else shard.data
    content = bytearray(path.read_bytes())
    if kind == "version":
        content[8] += 1  # the header's format version
    elif kind == "cut":
        del content[len(content) // 2 :]
    else:
        content[70] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["flipped byte", "cut", "index", "version"])
def test_training_makes_a_bad_shard_again_once(parts, rows, own_home, tmp_path, encoded, kind):
    """Case 25: what is damaged or of another version is never mixed in: the losses are those of a clean cache."""
    source = write_rows(tmp_path / "set.jsonl", rows)

    def losses(name):
        return losses_of(run_training(config_for(parts, source, tmp_path / name, steps=4)))

    clean = losses("clean")
    damage(cache_folder(own_home), kind)
    assert losses("mended") == clean
    assert losses("again") == clean
    first, mended, again = encoded
    expected = {"flipped byte": (1, 1), "cut": (2, first - 1), "index": (first, first), "version": (first, first)}[kind]
    assert expected[0] <= mended <= expected[1]
    assert again == 0


def test_damage_that_shows_while_training_ends_the_run_and_is_mended_by_the_next(
    parts, rows, own_home, tmp_path, encoded, capsys
):
    """Case 25: a bit that flips without a trace is found when it is read, named, and made again."""
    source = write_rows(tmp_path / "set.jsonl", rows)
    config = written(tmp_path / "run.yaml", config_for(parts, source, tmp_path / "run", steps=12))
    assert main(["train", str(config)]) == 0
    (shard,) = find_shards(cache_folder(own_home))
    before = shard.data.stat()
    damage(cache_folder(own_home), "flipped byte")
    os.utime(shard.data, ns=(before.st_atime_ns, before.st_mtime_ns))
    capsys.readouterr()
    assert main(["train", str(config), "--overwrite"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"cached features in {shard.data} are damaged: start again" in error
    assert main(["train", str(config), "--overwrite"]) == 0
    assert encoded[1:] == [0, 1]


def test_two_runs_at_once_encode_everything_once(parts, rows, own_home, tmp_path):
    """Case 25: two commands that begin together share one cache, whichever comes first."""
    source = write_rows(tmp_path / "set.jsonl", rows)
    configs = [written(tmp_path / f"{n}.yaml", config_for(parts, source, tmp_path / str(n), steps=3)) for n in (1, 2)]
    command = [sys.executable, "-m", "ultravox", "train"]
    running = [subprocess.Popen([*command, str(path)], stderr=subprocess.PIPE, text=True) for path in configs]
    errors = [process.communicate(timeout=2 * SECONDS)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    assert losses_of(tmp_path / "1") == losses_of(tmp_path / "2")
    (shard,) = find_shards(cache_folder(own_home))
    sizes = {run: summary_of(tmp_path / run)["num_clips"] for run in ("1", "2")}
    assert len(set(sizes.values())) == 1
    names = [entry[0] for entry in shard.entries(cache_folder(own_home).name).tolist()]
    assert len(names) == len(set(names)), "each once"


BUILD = """
import os, signal, sys
from ultravox.data import cache_shards
from ultravox.training.features import Features
cache_shards.SECONDS_BETWEEN_COMMITS = -1.0
encode, calls = Features.encode, []
def killed(self, waveforms):
    calls.append(len(waveforms))
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(self, waveforms)
Features.encode = killed
from ultravox.data import cache
cache.FeatureCache.build.__kwdefaults__["max_batch_seconds"] = 4.0
from ultravox.cli.main import main
main(sys.argv[1:])
"""


def test_a_builder_killed_for_memory_leaves_a_cache_to_go_on_with(parts, rows, own_home, tmp_path, encoded):
    """Case 25: SIGKILL inside the build; the next run takes the lock at once, and encodes only what is missing."""
    source = write_rows(tmp_path / "set.jsonl", rows)
    config = written(tmp_path / "run.yaml", config_for(parts, source, tmp_path / "run", steps=4))
    words = [sys.executable, "-c", BUILD, "data", "cache", "build", str(config)]
    assert subprocess.run(words, timeout=2 * SECONDS, capture_output=True).returncode == -signal.SIGKILL
    (shard,) = find_shards(cache_folder(own_home))
    kept = len(shard.entries(cache_folder(own_home).name))
    assert kept > 0
    begin = time.monotonic()
    assert main(["train", str(config)]) == 0
    assert time.monotonic() - begin < SECONDS
    num_clips = len({Path(row["audio"]).read_bytes() for row in rows})
    assert 0 < encoded[0] <= num_clips - kept


@pytest.mark.parametrize("moment", ["while the step computes", "while a batch is made"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_loader_worker_killed_for_memory_ends_the_run(parts, rows, tmp_path, monkeypatch, capsys, moment, streaming):
    """Case 25: one line, exit code 2, no worker left and no hang, whatever the run does at that moment."""
    source = write_shards(tmp_path / "set", rows) if streaming else write_rows(tmp_path / "set.jsonl", rows)
    changes = {"cache": "none", "loader": {"workers": 2}, "streaming": streaming, "steps": 40}
    config = written(tmp_path / "run.yaml", config_for(parts, source, tmp_path / "run", **changes))
    inner, calls = TuneTask._loss, []

    def loss(self, batch):
        calls.append(batch)
        if len(calls) == 3:
            multiprocessing.active_children()[0].kill()
            if moment == "while the step computes":
                time.sleep(1.0)
        return inner(self, batch)

    monkeypatch.setattr(TuneTask, "_loss", loss)
    begin = time.monotonic()
    assert main(["train", str(config)]) == 2
    assert time.monotonic() - begin < SECONDS
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("ultravox: error: a process that makes batches was killed")
    assert "data.loader.workers" in error
    gc.collect()  # the error's traceback holds the loader, which ends its workers when it goes
    while multiprocessing.active_children():
        assert time.monotonic() - begin < SECONDS, "a worker is left"
        time.sleep(0.05)
    assert not (tmp_path / "run" / "train.json").exists()


def test_a_killed_run_leaves_no_worker_behind(parts, rows, tmp_path):
    """Case 25, turned round: when the run itself is killed, its workers end."""
    source = write_rows(tmp_path / "set.jsonl", rows)
    changes = {"cache": "none", "loader": {"workers": 2}, "steps": 100_000}
    config = written(tmp_path / "run.yaml", config_for(parts, source, tmp_path / "run", **changes))
    command = [sys.executable, "-m", "ultravox", "train", str(config)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("looks at processes as Linux shows them")
    end = time.monotonic() + SECONDS
    while not (log := tmp_path / "run" / "log.jsonl").exists() or not log.read_text():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    workers = [int(word) for word in children.read_text().split()]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(workers) >= 2
    while any(Path(f"/proc/{worker}/exe").exists() for worker in workers):
        assert time.monotonic() < end, "a worker waits for a parent that is gone"
        time.sleep(0.05)


def test_a_worker_of_preparing_killed_for_memory_ends_it(parts, tmp_path):
    """Case 25: an error that says so; the same command goes on and comes to the same bytes."""
    clips = load_clips(parts[1])
    options = PrepareOptions(shards_multiple_of=16)

    def prepare(name, **more):
        prepare_dataset(tmp_path / name, {"train": lambda: iter(clips)}, options, **more)

    prepare("whole")

    def kill(done, total):
        if 0 < done < total / 2:
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)

    begin = time.monotonic()
    with pytest.raises(Exception, match="a worker process was killed") as caught:
        prepare("out", workers=2, on_progress=kill)
    assert type(caught.value).__name__ == "DataError"
    assert time.monotonic() - begin < SECONDS
    assert not (tmp_path / "out").exists()
    prepare("out", workers=2)
    verify(tmp_path / "out")
    names = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file()]
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in names)


def test_the_cache_command_says_what_is_damaged(parts, rows, own_home, tmp_path, capsys):
    """Case 25: `data cache info --verify` fails on damage, `build` mends it."""
    source = write_rows(tmp_path / "set.jsonl", rows)
    config = written(tmp_path / "run.yaml", config_for(parts, source, tmp_path / "run"))
    assert main(["data", "cache", "build", str(config)]) == 0
    damage(cache_folder(own_home), "flipped byte")
    assert main(["data", "cache", "info", "--verify"]) == 2
    assert main(["data", "cache", "build", str(config)]) == 0
    assert main(["data", "cache", "info", "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["version"] == 1
