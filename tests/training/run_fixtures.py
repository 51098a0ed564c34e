"""What whole runs start from; for the conftest of each folder whose tests make some."""

import pytest


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of a tiny language model and a tiny Whisper, and of a dataset of tones."""
    from tiny_run import save_tiny_models, save_tones

    folder = tmp_path_factory.mktemp("parts")
    return save_tiny_models(folder), save_tones(folder / "tones")


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    """A cache that the tests of one process share: what one has encoded, another may use."""
    monkeypatch.setenv("ULTRAVOX_HOME", str(tmp_path_factory.getbasetemp() / "home"))
