"""Finished parts are found again; a journal of something else is not taken."""

import json
import subprocess
import sys

import pytest

from ultravox.data.journal import Journal, first_difference
from ultravox.errors import DataError


def reopened(path, settings=None) -> Journal:
    journal = Journal(path, settings or {"seed": 0})
    journal.close()
    return journal


def test_parts_are_found_again(tmp_path):
    journal = Journal(tmp_path / "new" / "j", {"seed": 0})
    journal.add("speech", 2, [0.1, 0.2])
    journal.add("answers", 2, ["ü"])
    journal.close()
    again = reopened(tmp_path / "new" / "j")
    assert again.get("speech", 2) == [0.1, 0.2]
    assert again.get("answers", 2) == ["ü"]
    assert again.get("speech", 1) is None


def test_a_line_cut_short_anywhere_costs_its_part_alone(tmp_path):
    journal = Journal(tmp_path / "j", {"seed": 0})
    journal.add("speech", 0, [1.5])
    journal.add("speech", 1, [2.5])
    journal.close()
    content = (tmp_path / "j").read_bytes()
    ends = [number + 1 for number, byte in enumerate(content) if byte == ord("\n")]
    for length in range(len(content) + 1):
        path = tmp_path / f"cut{length}"
        path.write_bytes(content[:length])
        journal = Journal(path, {"seed": 0})
        parts = [journal.get("speech", part) for part in (0, 1)]
        assert parts == [[1.5] if length >= ends[1] else None, [2.5] if length >= ends[2] else None]
        journal.add("speech", 1, [3.5])
        journal.close()
        assert reopened(path).get("speech", 1) == [3.5]


def test_other_settings_are_refused(tmp_path):
    journal = Journal(tmp_path / "j", {"seed": 0, "voices": ["a"]})
    journal.add("speech", 0, 1)
    journal.close()
    with pytest.raises(DataError, match=r"was begun with voices a \(now b\): use that again, choose another place, or"):
        Journal(tmp_path / "j", {"seed": 0, "voices": ["b"]})
    with pytest.raises(DataError, match=r"was begun with more none \(now 1\)"):
        Journal(tmp_path / "j", {"seed": 0, "voices": ["a"], "more": 1})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ({"seed": 0}, {"seed": 0}, ""),
        ({"seed": 0}, {"seed": 1}, "seed 0 (now 1)"),
        ({"hold_out": False}, {"hold_out": True}, "hold_out false (now true)"),
        ({"speeds": [1.0, 1.1]}, {"speeds": [1.0]}, "speeds 1.0, 1.1 (now 1.0)"),
        (
            {"texts": {"file": "a.txt", "sha256": "0" * 64}},
            {"texts": {"file": "a.txt", "sha256": "1" * 64}},
            "another content of a.txt (it has changed since)",
        ),
        ({"texts": {"file": "a.txt"}}, {"texts": {"file": "b.txt"}}, "texts file a.txt (now b.txt)"),
        ({"texts": {"file": "a"}}, {"texts": {"templates": ["b"]}}, "texts file a (now none)"),
        (
            {"voices": [{"name": "joe"}, {"name": "ann", "version": "1"}]},
            {"voices": [{"name": "joe"}, {"name": "ann", "version": "2"}]},
            "voices 2 version 1 (now 2)",
        ),
        ({"voices": [{"name": "joe"}]}, {"voices": []}, "voices of 1 entries (now none)"),
        ({"prompt": "a" * 200 + "b"}, {"prompt": "a" * 200 + "c"}, f"prompt …{'a' * 10}b (now …{'a' * 10}c)"),
        ({"licence": ""}, {"licence": "l" * 100}, f"licence none (now {'l' * 79}…)"),
    ],
)
def test_a_difference_is_told_in_words(old, new, message):
    assert first_difference(old, new) == message


def test_work_that_never_began_leaves_nothing_and_binds_nobody(tmp_path):
    reopened(tmp_path / "made" / "for" / "j", {"seed": 0})
    assert list(tmp_path.iterdir()) == []
    killed = {"version": 1, "settings": {"seed": 0}}
    (tmp_path / "j").write_text(json.dumps(killed) + "\n")
    journal = Journal(tmp_path / "j", {"seed": 1})
    journal.add("speech", 0, 1)
    journal.close()
    assert reopened(tmp_path / "j", {"seed": 1}).get("speech", 0) == 1
    (tmp_path / "j").write_text(json.dumps(killed) + "\n")
    (tmp_path / "audio").mkdir()  # something was made, which no other settings may take for theirs
    with pytest.raises(DataError, match="was begun with seed 0"):
        Journal(tmp_path / "j", {"seed": 1})


def test_another_format_or_file_is_refused(tmp_path):
    (tmp_path / "j").write_text(json.dumps({"version": 9, "settings": {}}) + "\n")
    with pytest.raises(DataError, match="format version 9, this program reads 1"):
        Journal(tmp_path / "j", {})
    for content in ("a diary\n", "[]\n", '{"version": 1, "settings": {}}\n{"kind": 1}\n'):
        (tmp_path / "j").write_text(content)
        with pytest.raises(DataError, match="is not a journal"):
            Journal(tmp_path / "j", {})
        assert (tmp_path / "j").read_text() == content


def test_two_processes_do_not_share_it(tmp_path):
    held = Journal(tmp_path / "j", {})
    code = "import sys, pathlib; from ultravox.data.journal import Journal; Journal(pathlib.Path(sys.argv[1]), {})"
    command = [sys.executable, "-c", code, str(tmp_path / "j")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "is being made by another process" in done.stderr
    held.close()
    assert subprocess.run(command).returncode == 0
