"""Steps on two ranks, from inside: what each holds, ranks without audio or rows, and a gradient that is not finite."""

import json
from pathlib import Path

import pytest
from test_runs import SAME, write_config
from two_ranks import finish, start

PROGRAM = str(Path(__file__).parent / "ranks_program.py")


def found_on(config, world_size):
    results = finish(start([PROGRAM, str(config)], world_size), timeout=120)
    assert all(code == 0 for code, _ in results), results
    return [json.loads(next(line for line in output.splitlines() if line.startswith("{"))) for _, output in results]


@pytest.fixture(scope="module")
def alone(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    (found,) = found_on(write_config(parts, folder, "run"), 1)
    return found


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero2", "zero3"])
def test_two_ranks_step_as_one_process_does(parts, alone, tmp_path, kind):
    both = found_on(write_config(parts, tmp_path, "run", kind=kind), 2)
    for name in ("both", "one_has_nothing", "one_has_text_alone"):
        assert alone[name] > 0
        for found in both:
            assert found[name] == pytest.approx(alone[name], rel=SAME), name
    assert alone["both"] != pytest.approx(alone["one_has_nothing"], rel=1e-2)
    for found in both:
        assert found["skipped_ids"], "of all ranks, though one of them alone had an infinite gradient"
        assert found["skipped_ids"] == both[0]["skipped_ids"]
        assert found["unchanged"]
        assert found["sound"]
    if kind == "ddp":
        assert all(found["numbers"] == 0 for found in both)
        return
    if kind == "zero2":  # weights are whole, moments in halves
        assert all(found["numbers"] == 0 for found in both)
    else:
        assert both[0]["numbers"] > 10_000
        assert_halves([found["numbers_here"] for found in both], both[0]["numbers"])
    assert both[0]["trained"] > 500
    assert_halves([found["moments_here"] for found in both], both[0]["trained"])
    if kind == "fsdp2":
        assert sum(found["numbers_here"] for found in both) == both[0]["numbers"]
        assert sum(found["moments_here"] for found in both) == both[0]["trained"]
    else:
        assert sum(found["parts_here"] for found in both) == both[0]["trained"], "each number is updated by one rank"


def assert_halves(here, numbers):
    """Layers are cut along their first axis, vectors are filled up: nearly even."""
    assert numbers <= sum(here) < 1.05 * numbers
    for of_rank in here:
        assert 0.3 * numbers < of_rank < 0.7 * numbers
