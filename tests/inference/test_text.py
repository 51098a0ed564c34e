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


def test_the_loop_is_greedy_generation(tiny_models):
    """Rows of different lengths, some of which end before the others, against transformers' own loop."""
    from ultravox.inference.text import MAX_ANSWER_TOKENS
    from ultravox.model.factory import load_language_model, load_tokenizer

    model = load_language_model(str(tiny_models.llama))
    tokenizer = load_tokenizer(str(tiny_models.llama), "chatml.jinja")
    texts = ["Name a colour.", "Hi", "What is the capital of France?", "b", "Who are you, and why do you ask?"]

    def generate(text: str) -> list[int]:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        ids = model.generate(**inputs, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
        return ids[0, inputs.input_ids.shape[1] :].tolist()

    # random weights never end by themselves: let two tokens that come at different places end an answer
    model.generation_config.eos_token_id = [generate(texts[0])[10], generate(texts[1])[20]]
    answers = [generate(text) for text in texts]
    assert len({len(answer) for answer in answers}) > 1
    ends = model.generation_config.eos_token_id
    kept = [[token for token in answer if token not in ends] for answer in answers]
    expected = [first_sentence(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in kept]
    assert TextResponder(model, tokenizer)(texts) == expected
