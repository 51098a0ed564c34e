"""What a language model by itself answers to text: the reference for spoken requests."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MAX_ANSWER_TOKENS = 40
# a full stop, question or exclamation mark that ends a sentence ("3.5" and "e.g. this" go on), or a new line
SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s+[\"'(]?[A-Z0-9]|\s*$)|\n")
ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St|vs|etc|e\.g|i\.e|[A-Z])\.$")


def first_sentence(text: str) -> str:
    """The text up to the end of its first sentence, stripped; all of it when it has no end."""
    text = text.strip()
    for match in SENTENCE_END.finditer(text):
        sentence = text[: match.end()].strip()
        if not ABBREVIATION.search(sentence):
            return sentence
    return text


class TextResponder:
    """A language model that answers texts greedily, each with one sentence.

    A small model talks on and on; its first sentence carries the answer, and short answers make training cheap.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer with a chat template, padding on the left.
        batch_size: texts answered at once.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int = 64) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size

    def __call__(self, texts: Sequence[str]) -> list[str]:
        """One answer to each text, in order."""
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))  # little padding
        answers = [""] * len(texts)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            for index, answer in zip(chosen, self._answer([texts[index] for index in chosen]), strict=True):
                answers[index] = answer
        return answers

    @torch.inference_mode()
    def _answer(self, texts: Sequence[str]) -> list[str]:
        prompts = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            )
            for text in texts
        ]
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        start = inputs.input_ids.shape[1]

        def has_sentence(ids: Tensor, scores: Any, **_: Any) -> Tensor:
            """Which rows [row] hold more than their first sentence: the next one must have begun to know its end."""
            written = self.tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)
            done = [len(first_sentence(text)) < len(text.strip()) for text in written]
            return torch.tensor(done, device=ids.device)

        ids = self.model.generate(
            **inputs, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False, stopping_criteria=[has_sentence]
        )
        written = self.tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)
        return [first_sentence(text) for text in written]
