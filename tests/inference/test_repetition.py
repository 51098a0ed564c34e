"""What counts as a transcript that has run away."""

import pytest

from ultravox.data.sources import load_clips
from ultravox.errors import UltravoxError
from ultravox.inference.repetition import repeated_tail


@pytest.mark.parametrize(
    ("tokens", "repeated"),
    [
        ([], 0),
        ([1, 2, 3, 4, 5, 6] * 2, 6),  # six tokens said twice
        ([9, 8, 1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6], 6),
        ([1, 2, 3, 4, 5] * 2, 0),  # a short phrase said twice: people do
        ([1, 2, 3, 4, 5] * 3, 10),
        ([7] * 11, 0),  # a number that is spelt
        ([7] * 12, 11),
        ([1, 2] * 6, 10),
        ([1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6, 7], 0),  # it went on with something else
        (list(range(40)), 0),
    ],
)
def test_repeated_tail(tokens: list[int], repeated: int) -> None:
    assert repeated_tail(tokens) == repeated


@pytest.mark.network
def test_no_transcript_of_the_quickstart_is_cut_anywhere(not_fetched) -> None:
    """What people and voices really say there, with the quickstart's tokenizer, as it stands and in its spoken form."""
    from ultravox.data.synthesize import fetch_synthetic_en
    from ultravox.metrics.normalize import spoken_form
    from ultravox.model.factory import load_tokenizer

    try:
        tokenizer = load_tokenizer("smollm2-135m-instruct")
        texts = [clip.text for name in ("asterisk-en", fetch_synthetic_en()) for clip in load_clips(name, "train")]
    except UltravoxError as error:
        not_fetched(error)
    assert len(texts) == 1323
    for text in [*texts, *map(spoken_form, texts)]:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        assert not [end for end in range(len(tokens) + 1) if repeated_tail(tokens[:end])], text
