"""Hashes of audio files are remembered as long as the files are the same."""

import hashlib
import os
import time
from dataclasses import dataclass

import pytest

from ultravox.data import audio_hashes
from ultravox.data.audio_hashes import AudioHashes
from ultravox.errors import AudioError


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setattr(audio_hashes, "RACY_SECONDS", 0.0)
    paths = [tmp_path / f"{index}.wav" for index in range(20)]
    for path in paths:
        path.write_bytes(path.name.encode() * 100)
    time.sleep(0.01)
    return paths


@pytest.fixture
def table(tmp_path):
    return tmp_path / "cache" / "hashes.bin"


def find(table, files):
    hashes = AudioHashes(table)
    found = hashes.find(files)
    for path in files:
        there = getattr(path, "exists", lambda: True)()
        assert found[path] == (hashlib.sha256(path.read_bytes()).hexdigest() if there else None)
    return hashes.num_read


def test_unchanged_files_are_read_once(files, table):
    assert find(table, files[:15]) == 15
    assert find(table, files) == 5
    assert find(table, files[::-1]) == 0
    assert table.stat().st_size == 16 + 20 * 72


def test_a_changed_file_is_read_again_even_with_its_old_size_and_time(files, table):
    find(table, files)
    before = files[3].stat()
    files[3].write_bytes(b"x" * before.st_size)
    os.utime(files[3], ns=(before.st_atime_ns, before.st_mtime_ns))
    replacement = files[4].with_name("new")
    replacement.write_bytes(b"y" * files[4].stat().st_size)
    os.utime(replacement, ns=(before.st_atime_ns, files[4].stat().st_mtime_ns))
    os.replace(replacement, files[4])
    files[5].unlink()
    time.sleep(0.01)
    assert find(table, files) == 3  # one of them in vain
    assert find(table, files) == 1


def test_a_file_that_has_just_changed_is_not_remembered(files, table, monkeypatch):
    monkeypatch.setattr(audio_hashes, "RACY_SECONDS", 3600.0)
    assert find(table, files) == find(table, files) == 20
    assert not table.exists()


def test_two_tables_at_once_keep_what_both_have_read(files, table):
    first, second = AudioHashes(table), AudioHashes(table)
    first.find(files[:10])
    second.find(files[5:])
    assert second.num_read == 10
    assert find(table, files) == 0


@pytest.mark.parametrize("damage", [lambda c: c[:-1], lambda c: c[:40] + b"?" + c[41:], lambda c: b"", lambda c: c[:5]])
def test_a_damaged_table_is_made_again(files, table, damage):
    find(table, files)
    table.write_bytes(damage(table.read_bytes()))
    assert find(table, files) == 20
    assert find(table, files) == 0


def test_a_table_of_another_version_is_not_read(files, table):
    find(table, files)
    content = table.read_bytes()
    table.write_bytes(content[:8] + b"\2\0\0\0" + content[12:])
    assert find(table, files) == 20


@dataclass(frozen=True)
class Cell:
    """Audio that is no file."""

    content: bytes
    suffix: str = ".wav"

    def read(self) -> bytes:
        return self.content


@dataclass(frozen=True)
class KnownCell(Cell):
    def sha256(self) -> str:
        return "0" * 64


class Absent(Cell):
    def read(self) -> bytes:
        raise AudioError("gone")


def test_audio_that_is_no_file_may_know_its_hash(files, table):
    audios = [Cell(b"a"), KnownCell(b"b"), Absent(b"c"), files[0]]
    hashes = AudioHashes(table)
    found = hashes.find([*audios, *audios])
    assert found == {
        audios[0]: hashlib.sha256(b"a").hexdigest(),
        audios[1]: "0" * 64,
        audios[2]: None,
        files[0]: hashlib.sha256(files[0].read_bytes()).hexdigest(),
    }
    assert hashes.num_read == 3  # one of them in vain
    assert AudioHashes(table).find([]) == {}
