"""What is set aside is counted by reason, and too much of it stops."""

import pytest

from ultravox.data.quarantine import Quarantine
from ultravox.errors import DataError


def test_rows_are_counted_by_reason_and_once():
    quarantine = Quarantine()
    for reason, name in (("empty", "b"), ("empty", "b"), ("too long", "c"), ("empty", "a")):
        quarantine.add(reason, name)
    quarantine.update({"empty": ["a", "d"], "damaged": ["b"]})
    assert quarantine.reasons == {"empty": ["b", "a", "d"], "too long": ["c"], "damaged": ["b"]}
    assert quarantine.counts() == {"empty": 3, "too long": 1, "damaged": 1}
    assert list(quarantine.faults()) == ["empty", "damaged"]


def test_a_share_above_the_limit_stops_and_names_the_first():
    quarantine = Quarantine()
    quarantine.update({"empty": ["b", "a"], "damaged": ["b"]})
    quarantine.require(0.02, 100)
    with pytest.raises(DataError, match=r"2 of 99 clips .*\(1 damaged, 2 empty\), more than x = 0\.02 .* first is b:"):
        quarantine.require(0.02, 99, "x")


def test_what_the_configuration_asks_for_is_no_fault():
    quarantine = Quarantine()
    quarantine.update({"too long": ["a"], "too short": ["b"], "other language": ["c"]})
    quarantine.require(0.0, 4)
    assert quarantine.faults() == {}
    assert quarantine.counts() == {"too long": 1, "too short": 1, "other language": 1}
    quarantine.add("empty", "d")
    with pytest.raises(DataError, match=r"1 of 4 clips .*\(1 empty\)"):
        quarantine.require(0.0, 4)
