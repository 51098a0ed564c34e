"""docs/faults.md: each case has its line, and each test that it names exists."""

import ast
import re
from pathlib import Path

from ultravox.training.interrupt import MEMORY_EXIT_CODE, SIGNALS

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "faults.md").read_text()


def rows() -> list[list[str]]:
    """Cells of each line of the first table, without its head."""
    table = PAGE[PAGE.index("| | What goes wrong") : PAGE.index("## Exit codes")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]


def test_every_case_is_there_in_order():
    numbers = [row[0] for row in rows()]
    assert numbers == [*map(str, range(1, 16)), ""]
    assert all(all(row[1:]) for row in rows())


def test_every_test_that_is_named_exists():
    named = 0
    for row in rows():
        path = None
        for file, name in re.findall(r"`([\w/.]*)::(\w+)`", row[3]):
            path = TESTS / file if file else path
            assert path is not None, row
            functions = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
            assert name in functions, f"{path}::{name}"
            named += 1
        assert path is not None, row
        assert row[3].count("::") == len(re.findall(r"`[\w/.]*::\w+`", row[3]))
    assert named > 20


def test_the_exit_codes_are_those_of_the_code():
    codes = [int(code) for cell in re.findall(r"^\| (\d[\d, ]*) \|", PAGE[PAGE.index("## Exit") :], flags=re.M)
             for code in cell.split(", ")]  # fmt: skip
    assert codes == [0, 1, 2, MEMORY_EXIT_CODE, *(128 + number for number in SIGNALS)]
