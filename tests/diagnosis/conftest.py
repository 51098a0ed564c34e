"""Lets the tests here import their helper modules and those of tests/training, wherever pytest was started."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "training")]

import pytest  # noqa: E402
from run_fixtures import home  # noqa: E402, F401


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """Folders of a tiny language model that can repeat what it reads and a tiny Whisper, and of a dataset of tones."""
    from taught_models import save_taught_models
    from tiny_run import save_tones

    folder = tmp_path_factory.mktemp("taught")
    return save_taught_models(folder), save_tones(folder / "tones", num_clips=128)
