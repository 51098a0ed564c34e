"""What each audio token looks like to the language model: its nearest token embedding, along the time axis.

This is the view that alignment (CTC through the language model's own embedding table) trains: an audio embedding that
lies near a row of the table is read as that token. Silence and the inside of a long word lie near no row in particular,
which the low cosine shows.
"""

from dataclasses import dataclass

import numpy as np
import torch

from ultravox.tokens import AUDIO_TOKEN

METHOD = "nearest row of the language model's token embeddings by cosine similarity, for each audio token"


@dataclass(frozen=True, slots=True)
class TokenView:
    """For each audio token of one clip: the nearest text token and its cosine; ``seconds`` is the time of one token."""

    tokens: list[str]
    cosines: list[float]
    seconds: float

    def as_dict(self) -> dict:
        return {"tokens": self.tokens, "cosines": [round(c, 3) for c in self.cosines], "seconds": self.seconds}


@torch.inference_mode()
def token_view(model, processor, waveform: np.ndarray) -> TokenView:
    """The nearest token of every audio embedding of one waveform [sample] of at most one window."""
    from ultravox.audio.lengths import SAMPLE_RATE

    inputs = processor(text=AUDIO_TOKEN, audios=[waveform], sampling_rate=SAMPLE_RATE, return_tensors="pt")
    frames, frame_lengths = model.encode_audio(inputs["audio_values"].to(model.dtype), inputs["audio_lens"])
    embeddings, token_lengths = model.project(frames, frame_lengths)
    audio = embeddings[0, : int(token_lengths[0])].float()
    table = model.get_input_embeddings().weight.float()
    cosine = torch.nn.functional.normalize(audio, dim=-1) @ torch.nn.functional.normalize(table, dim=-1).T
    best = cosine[:, : len(processor.tokenizer)].max(dim=-1)
    tokens = [processor.tokenizer.decode([index]) for index in best.indices.tolist()]
    # The last token may reach past the end of the clip (its tail is zero-padded), so its time comes from the model.
    seconds = model.config.stack_factor / model.audio_tower.frames_per_second
    return TokenView(tokens, best.values.tolist(), seconds)
