"""Lets the tests here import their helper modules, wherever pytest was started."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from run_fixtures import home, parts  # noqa: F401
