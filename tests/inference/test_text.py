"""A language model's own answers to text."""

import pytest

from ultravox.inference.text import TextResponder, first_sentence


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The plural of man is men.", "The plural of man is men."),
        ("Yes. It is blue.", "Yes."),
        ("Is it? I think so", "Is it?"),
        ("Pi is 3.5 or so. Yes.", "Pi is 3.5 or so."),
        ("Dr. Smith said so. Yes.", "Dr. Smith said so."),
        ('He said "no." Then he left.', 'He said "no."'),
        ("First\nsecond", "First"),
        ("  no end at all ", "no end at all"),
        ("It is, e.g. this one. That is all.", "It is, e.g. this one."),
        ("Wow! 3 birds.", "Wow!"),
        ("", ""),
    ],
)
def test_first_sentence(text, expected):
    assert first_sentence(text) == expected


def test_answers_keep_their_order_and_do_not_depend_on_the_batch(tiny_models):
    from ultravox.model.factory import load_language_model, load_tokenizer

    model = load_language_model(str(tiny_models.llama))
    tokenizer = load_tokenizer(str(tiny_models.llama), "chatml.jinja")
    texts = ["Name a colour.", "Hi", "What is the capital of France?"]
    together = TextResponder(model, tokenizer, batch_size=3)(texts)
    assert together == [TextResponder(model, tokenizer)([text])[0] for text in texts]
    assert len(set(together)) > 1
