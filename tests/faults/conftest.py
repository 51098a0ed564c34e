"""What whole runs start from, as in tests/training."""

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "training")]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of a tiny language model and a tiny Whisper, and of a dataset of tones."""
    from tiny_run import save_tiny_models, save_tones

    folder = tmp_path_factory.mktemp("parts")
    return save_tiny_models(folder), save_tones(folder / "tones")


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ULTRAVOX_HOME", str(tmp_path_factory.getbasetemp() / "home"))
    # what one test has encoded, another may use: tests of the cache itself set a home of their own


@pytest.fixture
def rows(parts):
    """The rows of the tones, with absolute paths: a list that a test may change."""
    from faulty_runs import rows_of

    return rows_of(parts[1])
