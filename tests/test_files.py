"""Files are whole or absent, also when the disk is full."""

import errno
import os
from pathlib import Path

import pytest

from ultravox.cli.main import main
from ultravox.errors import UltravoxError
from ultravox.files import atomic_folder, atomic_write, sha256_file


@pytest.fixture
def full_disk(monkeypatch):
    """The next fsync finds no space left, as a file system with delayed allocation reports it."""

    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "deep" / "file.json"
    atomic_write(path, "old")
    atomic_write(path, b"new")
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["deep", "file.json"]
    assert sha256_file(path) == "11507a0e2f5e69d5dfa40a62a1bd7b6ee57e6bcd85c67c9b8431b36fff21c437"


def test_a_folder_replaces_an_older_one(tmp_path):
    for text in ("old", "new"):
        with atomic_folder(tmp_path / "folder") as folder:
            (folder / f"{text}.txt").write_text(text)
    assert names(tmp_path) == ["folder", "new.txt"]


def test_a_failure_leaves_nothing(tmp_path):
    def fail() -> None:
        with atomic_folder(tmp_path / "folder") as folder:
            (folder / "half.txt").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert names(tmp_path) == []


def test_full_disk_keeps_the_old_file(tmp_path, full_disk):
    path = tmp_path / "file.json"
    path.write_text("old")
    with pytest.raises(UltravoxError, match=r"disk full while writing .*file\.json: free some space"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.json"]


def test_full_disk_keeps_the_old_folder(tmp_path, full_disk):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old.txt").write_text("old")
    with pytest.raises(UltravoxError, match="disk full"), atomic_folder(tmp_path / "folder") as folder:
        (folder / "new.txt").write_text("new")
    assert names(tmp_path) == ["folder", "old.txt"]


def test_full_disk_is_one_line_and_code_2(tmp_path, full_disk, capsys):
    (tmp_path / "run.yaml").write_text("stages: [{name: align, objective: align, max_steps: 1}]\n")
    code = main(["train", str(tmp_path / "run.yaml"), "--run_dir", str(tmp_path / "run")])
    *progress, error = capsys.readouterr().err.splitlines()
    assert code == 2
    assert error.startswith("ultravox: error: disk full while writing ")
    assert "Traceback" not in "".join(progress)
    assert not (tmp_path / "run" / "config.yaml").exists()
