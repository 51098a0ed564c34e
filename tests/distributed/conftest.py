"""Lets the tests here import their helper modules and those of tests/training, wherever pytest was started."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "training")]

from run_fixtures import home, parts  # noqa: E402, F401
