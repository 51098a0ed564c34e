"""``ultravox data cache``: what it builds is what training finds; what it shows and clears."""

import json
import os
import re
import shutil
import threading
import time

import numpy as np
import pytest

from ultravox import files
from ultravox.audio.waveform import write_waveform
from ultravox.cli.main import main
from ultravox.data.cache_folder import building, describe, features_folder, hold, key_folders
from ultravox.data.cache_shards import find_shards
from ultravox.data.manifest import Clip, write_dataset

CONFIG = """
version: 1
run_dir: {folder}/run
model:
  language_model: {llama}
  audio_encoder: {whisper}
  stack_factor: 3
  projector_hidden_size: 48
  chat_template: {template}
data: {{sources: [{{name: {folder}/tones}}], speeds: [1.0, 0.9]}}
stages:
  - {{name: align, objective: align, max_steps: 1, max_batch_tokens: 400, optim: {{warmup_steps: 0}}}}
evaluation: {{num_progress_clips: 1}}
logging: {{tensorboard: false}}
"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory, tiny_models):
    """A folder with tones and a config; and the cached features that the first test makes of them."""
    folder = tmp_path_factory.mktemp("cache")
    (folder / "tones" / "audio").mkdir(parents=True)
    clips = []
    for index in range(6):
        path = folder / "tones" / "audio" / f"{index}.wav"
        write_waveform(path, np.sin(np.arange(16000 + 800 * index) * 0.1 * (index + 1)).astype(np.float32) * 0.3)
        clips.append(Clip(str(index), path, "one two", 1 + index / 20))
    write_dataset(folder / "tones", name="tones", licence="CC0", attribution="", splits={"train": clips})
    values = {"folder": folder, "llama": tiny_models.llama, "whisper": tiny_models.whisper, "template": "chatml.jinja"}
    (folder / "run.yaml").write_text(CONFIG.format(**values))
    return folder


@pytest.fixture(scope="module")
def built(parts):
    """A home with the features of the config."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ULTRAVOX_HOME", str(parts / "home"))
        assert main(["data", "cache", "build", str(parts / "run.yaml")]) == 0, "see what it says on standard error"
    return parts / "home"


@pytest.fixture
def home(built, tmp_path, monkeypatch):
    """A copy of that home."""
    shutil.copytree(built, tmp_path / "home")
    monkeypatch.setenv("ULTRAVOX_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def call(capsys, *words):
    capsys.readouterr()
    code = main(["data", "cache", *map(str, words)])
    captured = capsys.readouterr()
    if code:
        assert captured.err.count("\n") == 1
        assert captured.err.startswith("ultravox: error: ")
    return code, captured.out, captured.err


def test_build_makes_what_a_run_needs(parts, home, capsys):
    from ultravox.config.load import load_config
    from ultravox.training.run import run_training

    code, out, _ = call(capsys, "build", parts / "run.yaml")
    assert code == 0
    assert "6 clips, 12 versions with their speeds, 14.2 s, " in out
    assert "0 encoded in 0 encoder calls" in out
    assert str(key_folders()[0]) in out
    before = find_shards(key_folders()[0])[0].data.read_bytes()
    run_training(load_config(parts / "run.yaml"))
    assert len(key_folders()) == 1
    assert find_shards(key_folders()[0])[0].data.read_bytes() == before


def test_build_takes_overrides(parts, home, capsys):
    code, out, _ = call(capsys, "build", parts / "run.yaml", "--data.speeds", "[1.1]", "--data.max_audio_seconds=1.21")
    assert code == 0
    assert "5 clips, 5 versions" in out
    assert "left out: 1 too long" in out
    assert "5 encoded in 1 encoder calls" in out
    assert call(capsys, "build", parts / "run.yaml", "--data.max_cache_gb", "1e-6")[0] == 2
    assert call(capsys, "build", parts / "run.yaml", "--model.train_audio_encoder", "true")[0] == 0
    assert len(key_folders()) == 2, "log-mel features have a key of their own"
    code, out, _ = call(capsys, "info")
    assert "none, it trains" in out


def test_build_says_for_whom_it_waits(parts, home, capfd, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE_SECONDS", 0.3)
    words = ["data", "cache", "build", str(parts / "run.yaml"), "--data.speeds", "[1.0, 1.2]"]
    found: list[int] = []
    with building(key_folders()[0]):
        build = threading.Thread(target=lambda: found.append(main(words)))
        build.start()
        seen = ""
        while "waiting" not in seen:
            assert build.is_alive(), "it waited in silence, or not at all"
            time.sleep(0.05)
            seen += capfd.readouterr().err
        assert f"waiting for process {os.getpid()} on " in seen
        assert f"which computes features in {key_folders()[0]}" in seen
    build.join(60)
    assert found == [0]
    rest = capfd.readouterr()
    assert "waiting" not in rest.err
    assert "6 encoded" in rest.out


def test_build_has_nothing_to_do_for_a_stream(parts, home, capsys):
    text = (parts / "run.yaml").read_text().replace("objective: align", "objective: tune")
    (parts / "stream.yaml").write_text(text.replace("tones}", "tones, streaming: true}"))
    code, _, err = call(capsys, "build", parts / "stream.yaml")
    assert (code, "its source is streamed" in err) == (2, True)


def test_info_shows_each_key(parts, home, capsys, tiny_models):
    code, out, _ = call(capsys, "info")
    assert code == 0
    [title, row, total] = out.splitlines()
    assert title.split()[0] == "key"
    assert all(word in row for word in (key_folders()[0].name[:12], str(tiny_models.whisper), "LogMel-1", " 12 "))
    assert str(features_folder()) in total
    code, out, _ = call(capsys, "info", "--json", "--verify")
    content = json.loads(out)
    assert (code, content["version"], content["folder"]) == (0, 1, str(features_folder()))
    [key] = content["keys"]
    assert (key["num_entries"], key["health"], key["version"], key["in_use"]) == (12, "whole", 2, False)


def test_damage_is_an_error_of_the_check_alone(parts, home, capsys):
    [shard] = find_shards(key_folders()[0])
    content = bytearray(shard.data.read_bytes())
    content[100] ^= 1
    shard.data.write_bytes(content)
    assert call(capsys, "info")[0] == 0
    code, out, err = call(capsys, "info", "--verify")
    assert code == 2
    assert "1 entries damaged" in out
    assert "1 entries are damaged; the next run" in err
    assert "1 encoded in 1 encoder calls" in call(capsys, "build", parts / "run.yaml")[1]
    assert call(capsys, "info", "--verify")[0] == 0


def test_clear_removes_what_was_chosen(parts, home, capsys):
    key = key_folders()[0]
    assert call(capsys, "clear", "--older-than-days", "1")[1].startswith("nothing to remove in ")
    with hold(key):
        code, _, err = call(capsys, "clear", "--all")
        assert (code, key.exists()) == (2, True)
        assert "running processes use it" in err
    size = describe(key).num_bytes
    code, out, _ = call(capsys, "clear", "--key", key.name[:5])
    assert (code, key.exists()) == (0, False)
    said = rf"removed 1 key: 0\.0\d MB \((\d+) bytes\) in {features_folder()}; 0\.00 MB are left there\n"
    removed = re.fullmatch(said, out)
    assert int(removed[1]) == size
    assert "no cached features: 0 keys, 0.00 MB (" in call(capsys, "info")[1]
    (features_folder() / "audio-hashes.bin").write_bytes(b"x" * 120)
    out = call(capsys, "clear", "--all")[1]
    assert out.startswith(f"removed 1 table of audio files' hashes: 0.00 MB (120 bytes) in {features_folder()}; ")
    assert call(capsys, "clear", "--all")[1] == f"nothing to remove in {features_folder()}; 0.00 MB are left there\n"


def test_nothing_is_made_by_looking_and_clearing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ULTRAVOX_HOME", str(tmp_path / "misspelt"))
    assert call(capsys, "info")[0] == 0
    assert call(capsys, "clear", "--all")[1].startswith("nothing to remove in ")
    assert not (tmp_path / "misspelt").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["clear"], "say what to clear"),
        (["clear", "--all", "--key", "a"], "leave out --key"),
        (["clear", "--key", "zz"], "begins with 'zz'"),
        (["clear", "--older-than-days", "-1"], "takes a number from 0, got -1"),
        (["clear", "--older-than-days", "nan"], "takes a number from 0, got nan"),
        (["clear", "--json"], "--json belongs to `data cache info`, not clear"),
        (["info", "--all"], "--all belongs to `data cache clear`, not info"),
        (["info", "run.yaml"], "takes no config"),
        (["info", "--seed", "1"], "takes no config and no keys of one, got --seed"),
        (["info", "--jsn"], "unknown option --jsn; did you mean --json?"),
        (["build"], "needs a config"),
        (["build", "absent.yaml"], "absent.yaml: no such config file"),
        (["fill"], "invalid choice: 'fill'"),
        ([], "required: ACTION"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("ULTRAVOX_HOME", str(tmp_path))
    code, out, err = call(capsys, *words)
    assert (code, out) == (2, "")
    assert message in err


def test_a_run_that_caches_nothing_has_nothing_to_build(parts, home, capsys):
    code, _, err = call(capsys, "build", parts / "run.yaml", "--data.cache", "none")
    assert code == 2
    assert "caches nothing" in err
