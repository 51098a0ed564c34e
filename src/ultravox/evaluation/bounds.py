"""Bounds: the encoder's own recogniser (the ear of a cascade), and the language model given the transcript as text.

A speech language model sits between them: it can hardly hear better than its encoder's own decoder, and hardly repeat
better than its language model repeats a text that it is simply given.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ultravox.audio.lengths import MAX_WINDOW_SAMPLES, SAMPLE_RATE
from ultravox.errors import ModelError, UltravoxError
from ultravox.evaluation.checkpoint import Checkpoint
from ultravox.inference.generate import Decoding, generate_tokens
from ultravox.model.pretrained import quiet_loading, resolve_model

CASCADE_METHOD = (
    "the audio encoder's own pretrained Whisper decoder, greedy; each clip padded to 30 s as Whisper expects, longer "
    "clips in consecutive 30 s windows whose texts are joined"
)
TEXT_METHOD = (
    "the checkpoint's language model (its adapters included) gets the same prompt, with the tokens of the transcript "
    "in the place of the audio tokens; greedy"
)
MAX_CASCADE_TOKENS = 128  # per 30 s window; speech has 2-4 words a second, and a loop must end


class WhisperRecogniser:
    """A pretrained Whisper with its decoder.

    Args:
        folder: a Hugging Face folder with encoder, decoder, tokenizer and feature extractor.

    Raises:
        ModelError: the folder holds no Whisper, or one without its decoder.
    """

    def __init__(self, folder: str | Path):
        from transformers import AutoConfig, WhisperForConditionalGeneration, WhisperProcessor

        if AutoConfig.from_pretrained(folder).model_type != "whisper":
            raise ModelError(f"{folder} is no Whisper, so it has no decoder of its own")
        with quiet_loading():
            self.model, info = WhisperForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        if missing := [key for key in info["missing_keys"] if ".decoder." in key]:
            raise ModelError(f"{folder} has no decoder weights ({missing[0]} and {len(missing) - 1} more)")
        self.model.eval()
        self.processor = WhisperProcessor.from_pretrained(folder)
        if len(self.processor.tokenizer) < 0.9 * self.model.config.vocab_size:
            # transformers makes up an empty tokenizer where there is none: every text would be "", and the bound 100%
            raise ModelError(f"{folder} has no tokenizer for its decoder")
        multilingual = getattr(self.model.generation_config, "is_multilingual", False)
        self._language = {"language": "en", "task": "transcribe"} if multilingual else {}

    @torch.inference_mode()
    def _window_texts(self, windows: Sequence[np.ndarray]) -> list[str]:
        inputs = self.processor.feature_extractor(
            list(windows), sampling_rate=SAMPLE_RATE, return_tensors="pt", return_attention_mask=True
        )
        ids = self.model.generate(
            inputs.input_features,
            attention_mask=inputs.attention_mask,
            max_new_tokens=MAX_CASCADE_TOKENS,
            do_sample=False,
            num_beams=1,
            **self._language,
        )
        return [text.strip() for text in self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def transcribe(self, waveforms: Sequence[np.ndarray]) -> list[str]:
        """The texts of one batch of waveforms [sample]."""
        windows: list[np.ndarray] = []
        owners: list[int] = []
        for index, waveform in enumerate(waveforms):
            for start in range(0, max(1, len(waveform)), MAX_WINDOW_SAMPLES):
                windows.append(waveform[start : start + MAX_WINDOW_SAMPLES])
                owners.append(index)
        texts: list[list[str]] = [[] for _ in waveforms]
        for start in range(0, len(windows), len(waveforms)):
            batch = windows[start : start + len(waveforms)]
            for offset, text in enumerate(self._window_texts(batch)):
                texts[owners[start + offset]].append(text)
        return [" ".join(part for part in parts if part) for parts in texts]


def find_recogniser(checkpoint: Checkpoint) -> tuple[WhisperRecogniser | None, str]:
    """The recogniser that a checkpoint's encoder comes from, and "", or None and the reason why it is absent."""
    name = checkpoint.audio_encoder
    if name is None:
        return None, "no run config beside the checkpoint says which pretrained Whisper its encoder comes from"
    try:
        return WhisperRecogniser(resolve_model(name)), ""
    except (UltravoxError, OSError, ValueError, TypeError, KeyError) as error:  # transformers raises all of these
        return None, f"{name}: {(str(error) or type(error).__name__).splitlines()[0]}"


def splice_text(prompt_ids: Sequence[int], text_ids: Sequence[int], audio_token_index: int) -> list[int]:
    """The prompt's tokens with ``text_ids`` where its one audio placeholder stands. ValueError without exactly one."""
    places = [index for index, token in enumerate(prompt_ids) if token == audio_token_index]
    if len(places) != 1:
        raise ValueError(f"expected one audio placeholder in the prompt, got {len(places)}")
    return [*prompt_ids[: places[0]], *text_ids, *prompt_ids[places[0] + 1 :]]


class TextReader:
    """The language model of a checkpoint, given texts where it would hear audio.

    Args:
        model, processor: as ``load_model`` returns them.
        prompt: the rendered prompt, with one audio placeholder and ending where the answer begins.
    """

    def __init__(self, model, processor, prompt: str, *, max_new_tokens: int):
        self.model, self.tokenizer, self.max_new_tokens = model, processor.tokenizer, max_new_tokens
        self.prompt_ids = self.tokenizer(prompt, add_special_tokens=False).input_ids

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> list[str]:
        """What the model writes after each prompt; one batch, padded on the left."""
        audio_token = self.model.config.audio_token_index
        rows = [
            splice_text(self.prompt_ids, self.tokenizer(text, add_special_tokens=False).input_ids, audio_token)
            for text in texts
        ]
        longest = max(map(len, rows))
        device = self.model.device
        # What is padding is masked, so that any token will do there, but not the placeholder: it wants audio.
        input_ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
        written: list[list[int]] = [[] for _ in rows]
        for step in generate_tokens(self.model, self.model.embed(input_ids), mask, Decoding(self.max_new_tokens)):
            for row, token in step:
                written[row].append(token)
        return [text.strip() for text in self.tokenizer.batch_decode(written, skip_special_tokens=True)]
