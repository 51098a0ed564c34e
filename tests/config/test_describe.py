"""The generated documentation and the helpers behind it."""

from pathlib import Path

import pytest

from ultravox.config.describe import markdown
from ultravox.config.load import describe_keys
from ultravox.config.walk import field_names_at

DOCS = Path(__file__).parents[2] / "docs"


def test_the_committed_page_is_the_generated_one():
    assert (DOCS / "configuration.md").read_text() == markdown(), "run `make docs` and commit docs/configuration.md"


def test_every_key_says_what_it_means():
    assert [key.path for key in describe_keys() if not key.description] == []


def test_types_ranges_and_defaults():
    keys = {key.path: key for key in describe_keys()}
    rate = keys["stages[].optim.lr.projector"]
    assert (rate.type, rate.default) == ("number ≥ 0, ≤ 1", "0.001")
    assert keys["stages[].objective"].default == "required"
    assert keys["stages[].sources"].type == "list of text or null"
    assert keys["stages[].optim.betas"].type == "2 × number ≥ 0, < 1"
    assert keys["model.audio_encoder_lora.target_modules"].default != (
        keys["model.language_model_lora.target_modules"].default
    )


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (("stages", 0, "optim", "lr"), ["projector", "language_model", "audio_encoder"]),
        (("seed",), None),
        (("nothing", "here"), None),
    ],
)
def test_known_keys_of_a_section(path, expected):
    assert field_names_at(path) == expected
