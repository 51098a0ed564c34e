"""Decoding: one loop for batches, streams and conversations."""

import math
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import BatchFeature, DynamicCache

from ultravox.audio.lengths import SAMPLE_RATE
from ultravox.data.prompts import TRANSCRIBE_PROMPT, Message, render_prompt, user_message
from ultravox.errors import DataError
from ultravox.inference.repetition import repeated_tail
from ultravox.model.modeling import UltravoxModel
from ultravox.model.processing import UltravoxProcessor

#: Nobody speaks faster than this; a transcript that goes on past it has run away into repetition.
TRANSCRIPT_TOKENS_PER_SECOND = 6.0
TRANSCRIPT_EXTRA_TOKENS = 4


def transcript_token_limit(num_samples: int) -> int:
    """The most tokens that a transcript of so many samples can have."""
    return TRANSCRIPT_EXTRA_TOKENS + math.ceil(num_samples / SAMPLE_RATE * TRANSCRIPT_TOKENS_PER_SECOND)


@dataclass(frozen=True, slots=True)
class Decoding:
    """How tokens are chosen: greedily at temperature 0, else drawn from the `top_p` share of the distribution."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise DataError(
                f"expected max_new_tokens of at least 1, a temperature of at least 0 and top_p in (0, 1], got "
                f"{self.max_new_tokens}, {self.temperature} and {self.top_p}"
            )

    def choose(self, logits: Float[Tensor, "row vocabulary"], generator: torch.Generator) -> Int[Tensor, " row"]:
        """The next token of each row."""
        if self.temperature == 0:
            return logits.argmax(-1)
        shares = torch.softmax(logits / self.temperature, dim=-1)
        if self.top_p < 1:
            ordered, order = shares.sort(dim=-1, descending=True)
            ordered[ordered.cumsum(-1) - ordered >= self.top_p] = 0
            shares = torch.zeros_like(shares).scatter_(-1, order, ordered)
        return torch.multinomial(shares, 1, generator=generator).squeeze(1)


@torch.no_grad()
def generate_tokens(
    model: UltravoxModel,
    inputs_embeds: Float[Tensor, "row token hidden"],
    attention_mask: Int[Tensor, "row past_and_token"],
    decoding: Decoding,
    cache: DynamicCache | None = None,
    stopped: Container[int] = (),
) -> Iterator[list[tuple[int, int]]]:
    """Decode step by step: a list of (row, token) for the rows that still write, their end tokens included.

    Rows that have ended leave the batch, so that they cost nothing; so do those that the caller has put into `stopped`
    between two steps. With `cache`, `inputs_embeds` are the new positions
    only and `attention_mask` covers all; when the loop ends, the cache holds all but each row's last token.

    Raises:
        DataError: prompt and answer do not fit into the language model's context.
    """
    limit = getattr(model.config.text_config, "max_position_embeddings", None)
    if limit and attention_mask.shape[1] + decoding.max_new_tokens > limit:
        raise DataError(
            f"{attention_mask.shape[1]} positions of prompt and {decoding.max_new_tokens} of answer exceed the "
            f"language model's {limit}: give shorter audio or fewer turns"
        )
    cache = DynamicCache(config=model.config.text_config) if cache is None else cache
    ends = torch.tensor(end_ids(model), device=inputs_embeds.device)
    generator = torch.Generator(inputs_embeds.device)
    if decoding.seed is not None:
        generator.manual_seed(decoding.seed)
    else:
        generator.seed()
    rows = list(range(len(inputs_embeds)))
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -inputs_embeds.shape[1] :]
    for _ in range(decoding.max_new_tokens):
        logits = model.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        logits[:, model.config.audio_token_index :][:, :1] = -torch.inf  # where the table has a row for it
        logits[:, getattr(model.config, "audio_boundary_ids", [])] = -torch.inf
        tokens = decoding.choose(logits.float(), generator)
        yield list(zip(rows, tokens.tolist(), strict=True))
        goes_on = torch.tensor([row not in stopped for row in rows], device=tokens.device)
        writes = goes_on & ~torch.isin(tokens, ends)
        if not bool(writes.any()):
            return
        if not bool(writes.all()):
            kept = writes.nonzero().squeeze(1)
            cache.batch_select_indices(kept)
            rows = [rows[index] for index in kept.tolist()]
            tokens, attention_mask = tokens[kept], attention_mask[kept]
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(rows), 1)], dim=1)
        positions = attention_mask.sum(-1, keepdim=True) - 1
        inputs_embeds = model.embed(tokens[:, None])


def end_ids(model: UltravoxModel) -> list[int]:
    """The tokens that end an answer."""
    ids = model.generation_config.eos_token_id
    return list(ids) if isinstance(ids, list | tuple) else [] if ids is None else [ids]


def generate_texts(
    model: UltravoxModel,
    processor: UltravoxProcessor,
    batch: BatchFeature,
    decoding: Decoding,
    token_limits: Sequence[int] | None = None,
    *,
    cut_repetition: bool = False,
) -> list[str]:
    """Answers to a processed batch, in its order, stripped; none longer than its own limit, in any company.

    With `cut_repetition`, an answer ends where it begins to repeat itself (`repeated_tail`).
    """
    with torch.no_grad():
        embeddings, mask = model.hear_prompt(**batch)
    answers: list[list[int]] = [[] for _ in range(len(embeddings))]
    stopped: set[int] = set()
    for step in generate_tokens(model, embeddings, mask, decoding, stopped=stopped):
        for row, token in step:
            answer = answers[row]
            answer.append(token)
            if cut_repetition and (repeated := repeated_tail(answer)):
                del answer[-repeated:]
                stopped.add(row)
            elif token_limits is not None and len(answer) >= token_limits[row]:
                stopped.add(row)
    return [text.strip() for text in processor.batch_decode(answers, skip_special_tokens=True)]


def answer_batch(
    model: UltravoxModel,
    processor: UltravoxProcessor,
    waveforms: Sequence[np.ndarray],
    *,
    prompt: str = "",
    batch_size: int = 8,
    max_new_tokens: int = 256,
    token_limit: Callable[[int], int] | None = None,
    cut_repetition: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Answer each waveform [sample], greedily, with the same text after it. The result is in the order given.

    `token_limit` says how many tokens an answer to so many samples may have, where that is less than `max_new_tokens`.
    With `cut_repetition`, answers end where they begin to repeat themselves. `on_progress` is told how many are done.
    """
    text = render_prompt(processor.tokenizer, [user_message(prompt)])
    order = sorted(range(len(waveforms)), key=lambda index: -len(waveforms[index]))  # memory peaks in the first batch
    texts = [""] * len(waveforms)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = processor(text=[text] * len(chosen), audio=[waveforms[index] for index in chosen])
        limits = [token_limit(len(waveforms[index])) for index in chosen] if token_limit else None
        decoding = Decoding(min(max_new_tokens, max(limits)) if limits else max_new_tokens)
        answers = generate_texts(model, processor, batch, decoding, limits, cut_repetition=cut_repetition)
        for index, answer in zip(chosen, answers, strict=True):
            texts[index] = answer
        if on_progress is not None:
            on_progress(start + len(chosen))
    return texts


def transcribe(
    model: UltravoxModel,
    processor: UltravoxProcessor,
    waveforms: Sequence[np.ndarray],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 256,
    on_progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Write down what is said in each waveform [sample]; clips of like length go together, the order is kept.

    A transcript ends at the latest where nobody could have spoken more (`transcript_token_limit`), and where it begins
    to say the same over and over (`repeated_tail`).
    """
    return answer_batch(
        model,
        processor,
        waveforms,
        prompt=TRANSCRIBE_PROMPT,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        token_limit=transcript_token_limit,
        cut_repetition=True,
        on_progress=on_progress,
    )


def stream_answer(
    model: UltravoxModel,
    processor: UltravoxProcessor,
    messages: list[Message],
    waveforms: Sequence[np.ndarray],
    decoding: Decoding | None = None,
) -> Iterator[str]:
    """Pieces of the answer to a dialogue, as they come.

    Args:
        messages: turns whose ``<|audio|>`` stand for the waveforms, in order.
        waveforms: each [sample].

    Raises:
        DataError: placeholders and waveforms differ in number, before anything is computed.
    """
    batch = processor(text=render_prompt(processor.tokenizer, messages), audio=list(waveforms))

    def pieces() -> Iterator[str]:
        with torch.no_grad():
            embeddings, mask = model.hear_prompt(**batch)
        steps = generate_tokens(model, embeddings, mask, decoding or Decoding())
        yield from stream_text(processor.tokenizer, (step[0][1] for step in steps))

    return pieces()


def stream_text(tokenizer: Any, tokens: Iterable[int]) -> Iterator[str]:
    """Tokens to text as they come; a character whose bytes are not all there yet is held back."""
    ids: list[int] = []
    done = ""
    text = ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if len(text) > len(done) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(done) :]
            done = text
    if len(text) > len(done):
        yield text[len(done) :]
