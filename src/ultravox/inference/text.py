"""What a language model by itself answers to text: the reference for spoken requests."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

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
        ends = model.generation_config.eos_token_id
        self.end_ids = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}

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
        ids, mask = inputs.input_ids, inputs.attention_mask
        written: list[list[int]] = [[] for _ in texts]
        rows = list(range(len(texts)))  # those that still write; the others leave the batch, so that they cost nothing
        cache = DynamicCache(config=self.model.config)
        for _ in range(MAX_ANSWER_TOKENS):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            output = self.model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
            )
            chosen = output.logits[:, -1].argmax(-1).tolist()
            going = [
                place
                for place, (row, token) in enumerate(zip(rows, chosen, strict=True))
                if self._goes_on(written[row], token)
            ]
            if not going:
                break
            if len(going) < len(rows):
                keep = torch.tensor(going)
                cache.batch_select_indices(keep)
                mask, rows, chosen = mask[keep], [rows[place] for place in going], [chosen[place] for place in going]
            ids = torch.tensor(chosen)[:, None]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        return [first_sentence(self.tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in written]

    def _goes_on(self, written: list[int], token: int) -> bool:
        """Note a token; False once the first sentence is whole, which only what follows it can tell."""
        if token in self.end_ids:
            return False
        written.append(token)
        text = self.tokenizer.decode(written, skip_special_tokens=True).strip()
        return first_sentence(text) == text
