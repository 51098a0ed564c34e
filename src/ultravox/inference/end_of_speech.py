"""Whether the speaker has finished, as a stop head hears it in the language model's states."""

import numpy as np
import torch

from ultravox.data.prompts import render_prompt, user_message
from ultravox.errors import DataError
from ultravox.model.modeling import UltravoxModel
from ultravox.model.processing import UltravoxProcessor
from ultravox.objectives.end_of_audio import StopHead


@torch.no_grad()
def score_speech_end(
    model: UltravoxModel, processor: UltravoxProcessor, head: StopHead, waveform: np.ndarray
) -> np.ndarray:
    """Probability [position] at each audio position that the speaker has finished by then.

    What a position knows of later audio is what the encoder lets through: of a whole clip, the last one is for use.

    Raises:
        DataError: a head of another width, or a projector that drops positions.
    """
    hidden_size = model.config.text_config.hidden_size
    if head.linear.in_features != hidden_size:
        raise DataError(f"the stop head reads states of {head.linear.in_features}, but this model has {hidden_size}")
    if model.multi_modal_projector.compresses:
        raise DataError("a projector that compresses has no position for each moment to judge: use another one")
    batch = processor(text=render_prompt(processor.tokenizer, [user_message("")]), audio=[waveform])
    embeddings, mask = model.hear_prompt(**batch)
    states = model.get_decoder()(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).last_hidden_state
    heard = batch["input_ids"][0] == model.config.audio_token_index
    scores: np.ndarray = torch.sigmoid(head(states[0, heard])).cpu().numpy()
    return scores
