"""Limits on length, pace and language, and how a text's characters are counted."""

import pytest

from ultravox.audio.content import NO_AUDIO
from ultravox.data.filters import Filters, characters_per_second, num_characters, total_seconds
from ultravox.data.manifest import Clip
from ultravox.errors import DataError
from ultravox.metrics.normalize import spoken_form


@pytest.fixture
def clip(tmp_path):
    def make(text="hello there", seconds=1.0, **options):
        return Clip("1", tmp_path / "a.wav", text, seconds, **options)

    return make


@pytest.mark.parametrize(
    ("limits", "seconds", "reason"),
    [
        ({"min_seconds": 1.0}, 1.0, None),
        ({"min_seconds": 1.0}, 0.99, "too short"),
        ({"max_seconds": 1.0}, 1.0, None),
        ({"max_seconds": 1.0}, 1.01, "too long"),
        ({"min_characters_per_second": 11}, 1.0, None),
        ({"min_characters_per_second": 11}, 1.01, "too slow"),
        ({"max_characters_per_second": 11}, 1.0, None),
        ({"max_characters_per_second": 11}, 0.99, "too fast"),
        ({}, 1e6, None),
    ],
)
def test_limits_are_kept_to_and_include_themselves(clip, limits, seconds, reason):
    assert Filters(**limits).reason(clip(seconds=seconds)) == reason


@pytest.mark.parametrize("unit", ["seconds", "characters_per_second"])
def test_limits_that_leave_nothing_are_refused(unit):
    Filters(**{f"min_{unit}": 2.0, f"max_{unit}": 2.0})
    with pytest.raises(DataError, match=f"min_{unit} = 3 is more than max_{unit} = 2.5, so no clip is left"):
        Filters(**{f"min_{unit}": 3.0, f"max_{unit}": 2.5})


def test_languages_are_those_that_rows_name(clip):
    filters = Filters(languages=["en", "de-CH"])
    assert filters.reason(clip(language="de-CH")) is None
    assert filters.reason(clip(language="de")) == "other language"
    assert filters.reason(clip()) == "other language"


def test_all_the_audio_of_a_conversation_counts_and_its_text_has_no_pace(clip, tmp_path):
    turns = ({"role": "user", "content": "<|audio|><|audio|>"},)
    talk = clip(text="", more_audio=((tmp_path / "b.wav", 2.0),), messages=turns)
    assert total_seconds(talk) == 3.0
    assert Filters(max_seconds=2.9).reason(talk) == "too long"
    assert Filters(max_seconds=3.0, min_characters_per_second=1).reason(talk) is None


def test_a_text_alone_has_neither_length_nor_pace():
    text = Clip("1", NO_AUDIO, "hello", 0.0)
    assert Filters(min_seconds=1, max_characters_per_second=0.1).reason(text) is None
    assert characters_per_second(text) == 0.0


@pytest.mark.parametrize("text", ["Don’t -- “stop”!", "नमस्ते", "  a_b\n12 ", "—", "", "Ünï cödé", "東京 です"])
def test_characters_are_those_of_the_spoken_form(text):
    assert num_characters(text) == len(spoken_form(text))
