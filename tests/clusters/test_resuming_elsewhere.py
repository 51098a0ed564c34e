"""Why jobs link their data to one name: what a run compares when it goes on, on two mounts of one dataset."""

import json
import os
import shutil
import wave
from pathlib import Path

import pytest

from ultravox.cli import main as cli
from ultravox.config.load import load_config
from ultravox.data.sources import open_source
from ultravox.training.identity import deciding_keys
from ultravox.training.rows import source_key, source_spec

CONFIG = Path(__file__).parents[2] / "configs" / "audiollm.yaml"


@pytest.fixture
def mounts(tmp_path, capsys) -> tuple[Path, Path]:
    """One prepared dataset in two places, as two jobs see it."""
    rows = []
    for number in range(3):
        with wave.open(str(tmp_path / f"{number}.wav"), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", ""))
            file.writeframes(bytes([number + 1, 0]) * 16000)
        rows.append({"id": str(number), "audio": f"{number}.wav", "text": "hello", "speaker": "a", "licence": "CC0"})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = tmp_path / "first-job" / "data", tmp_path / "second-job" / "data"
    words = [str(tmp_path / "train.jsonl"), "--output", str(first), "--keep-silent"]
    assert cli.main(["data", "prepare", *words]) == 0, capsys.readouterr().err
    shutil.copytree(first, second)
    return first, second


def seen_in(folder: Path, monkeypatch, *overrides: str):
    """What a run in this folder would keep in its checkpoints about its data and configuration."""
    monkeypatch.chdir(folder)
    config = load_config(CONFIG, overrides)
    (source,) = config.data.sources
    return deciding_keys(config), {source_key(source): open_source(source_spec(source)).fingerprint()}


def test_a_link_of_one_name_is_the_same_data(mounts, tmp_path, monkeypatch):
    seen = []
    for number, mount in enumerate(mounts):
        code = tmp_path / f"code-{number}"
        (code / "data").mkdir(parents=True)
        os.symlink(mount, code / "data" / "audiollm")
        seen.append(seen_in(code, monkeypatch))
    assert seen[0] == seen[1]


def test_the_mounts_own_names_are_not(mounts, tmp_path, monkeypatch):
    first, second = (seen_in(tmp_path, monkeypatch, "--data.sources.0.name", str(mount)) for mount in mounts)
    assert first[0] != second[0]
    assert first[1] != second[1]
