"""A checkpoint as a ``System``: its model, its prompts, and the bounds that belong to it."""

from functools import partial
from typing import Any

import torch

from ultravox.data.prompts import TRANSCRIBE_PROMPT, render_prompt, user_message
from ultravox.evaluation.bounds import TEXT_METHOD, TextReader, find_recogniser
from ultravox.evaluation.checkpoint import Checkpoint
from ultravox.evaluation.system import System
from ultravox.evaluation.token_view import token_view
from ultravox.inference.generate import (
    TRANSCRIPT_EXTRA_TOKENS,
    TRANSCRIPT_TOKENS_PER_SECOND,
    answer_batch,
    transcribe,
)
from ultravox.inference.repetition import MIN_REPEATED_TOKENS, MIN_TIMES
from ultravox.metrics.normalize import spoken_form
from ultravox.model.factory import load_model


def load_system(checkpoint: Checkpoint, *, batch_size: int, max_new_tokens: int) -> System:
    """The functions that ``evaluate`` calls, for a saved model."""
    model, processor = load_model(str(checkpoint.model))
    model.eval()
    prompt = render_prompt(processor.tokenizer, [user_message(TRANSCRIBE_PROMPT)])
    question_prompt = render_prompt(processor.tokenizer, [user_message()])
    recogniser, why_not = find_recogniser(checkpoint)
    options: dict[str, Any] = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    no_gradients = torch.inference_mode()
    read = TextReader(model, processor, prompt, max_new_tokens=max_new_tokens)
    # The bound is for perfect audio embeddings, and those stand for words in the style that the model was trained on.
    spoken = (checkpoint.config.get("data") or {}).get("transcript_style") == "spoken"
    return System(
        transcribe=no_gradients(partial(transcribe, model, processor, **options)),
        transcribe_one=no_gradients(partial(transcribe, model, processor, **options | {"batch_size": 1})),
        answer=no_gradients(partial(answer_batch, model, processor, **options)),
        transcribe_text=(lambda texts: read([spoken_form(text) for text in texts])) if spoken else read,
        answer_text=TextReader(model, processor, question_prompt, max_new_tokens=max_new_tokens),
        recognise=recogniser.transcribe if recogniser else None,
        view_tokens=partial(token_view, model, processor),
        prompt=prompt,
        transcript_limit={
            "extra_tokens": TRANSCRIPT_EXTRA_TOKENS,
            "tokens_per_second": TRANSCRIPT_TOKENS_PER_SECOND,
            "min_repeated_tokens": MIN_REPEATED_TOKENS,
            "min_times": MIN_TIMES,
        },
        text_method=TEXT_METHOD + ("; words alone, in lower case, as in its training" if spoken else ""),
        absent={"recognise": why_not} if why_not else {},
    )
