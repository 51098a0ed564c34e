"""Lets the tests here import `golden_run`, whatever folder pytest was started in."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of the tiny models, and of a dataset of tones."""
    from golden_run import save_tiny_models, save_tones

    folder = tmp_path_factory.mktemp("golden")
    return save_tiny_models(folder), save_tones(folder / "tones")
