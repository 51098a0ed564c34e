"""Lets the tests here import their helper modules, wherever pytest was started; what whole runs start from."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of a tiny language model and a tiny Whisper, and of a dataset of tones."""
    from tiny_run import save_tiny_models, save_tones

    folder = tmp_path_factory.mktemp("parts")
    return save_tiny_models(folder), save_tones(folder / "tones")


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ULTRAVOX_HOME", str(tmp_path_factory.getbasetemp() / "home"))
