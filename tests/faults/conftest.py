"""What whole runs start from, as in tests/training."""

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "training")]

from run_fixtures import home, parts  # noqa: E402, F401


@pytest.fixture
def rows(parts):  # noqa: F811
    """The rows of the tones, with absolute paths: a list that a test may change."""
    from faulty_runs import rows_of

    return rows_of(parts[1])
