"""Text and waveforms to what the model takes; saved beside it in the files that its consumers read."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoFeatureExtractor, AutoProcessor, AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.utils import cached_file

from ultravox.audio.features import FeatureExtractor, StackedFilterbank, feature_extractor_of, windows
from ultravox.audio.lengths import (
    HOP_LENGTH,
    MEL_CHAIN,
    SAMPLE_RATE,
    Chain,
    chain_length,
    convolution_chain,
    filterbank_chain,
    num_audio_tokens,
    receptive_field,
    window_lengths,
)
from ultravox.errors import AudioError, DataError
from ultravox.model.boundaries import AUDIO_END_TOKEN, AUDIO_START_TOKEN
from ultravox.model.configuration import UltravoxConfig
from ultravox.model.manifest import write_manifest
from ultravox.tokens import AUDIO_TOKEN

PROCESSOR_FILE = "processor_config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
PROCESSOR_VERSION = 1


class UltravoxProcessor(ProcessorMixin):
    """Expands each ``<|audio|>`` to its clip's positions and computes the encoder's features.

    Args:
        audio_processor: a WhisperFeatureExtractor, Wav2Vec2FeatureExtractor or SeamlessM4TFeatureExtractor; its
            settings decide the features.
        tokenizer: with ``<|audio|>`` as one special token.
        stack_factor: encoder frames per language model position.
        convolution_layers: (kernel, stride) of each layer of an encoder that hears the waveform; None for Whisper.
        audio_boundaries: a token before and one after each clip; the tokenizer has them.
        length_chains: from samples to frames, where the features alone do not say it: of each encoder that stands side
            by side, the most frames of which count, or of one of another kind.
        min_samples: the shortest window, where there are length_chains.
        audio_padding: "padded" = Whisper hears silence behind each clip, up to 30 s.
        raw_features: without the step that looks at the whole clip: for an encoder that runs in blocks.
    """

    attributes = ["audio_processor", "tokenizer"]  # noqa: RUF012 - as in the base
    audio_processor_class = "AutoFeatureExtractor"
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        audio_processor: Any = None,
        tokenizer: Any = None,
        stack_factor: int = 5,
        convolution_layers: Sequence[Sequence[int]] | None = None,
        chat_template: str | None = None,
        audio_boundaries: bool = False,
        length_chains: Sequence[Chain] | None = None,
        min_samples: int | None = None,
        audio_padding: str = "true_length",
        raw_features: bool = False,
    ):
        self.length_chains, self.least_samples = length_chains, min_samples
        self.audio_padding, self.raw_features = audio_padding, raw_features
        self.audio_boundaries = audio_boundaries
        self.stack_factor = stack_factor
        self.convolution_layers = convolution_layers
        self.audio_token_replacement = AUDIO_TOKEN  # vLLM sets both anew
        self.audio_replacement_token_id = tokenizer.convert_tokens_to_ids(AUDIO_TOKEN)
        if len(tokenizer.encode(AUDIO_TOKEN, add_special_tokens=False)) != 1:
            raise DataError(
                f"the tokenizer must hold {AUDIO_TOKEN} as one special token: add it with add_special_token"
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"
        super().__init__(audio_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)

    @property
    def audio_token_index(self) -> int:
        """The id of ``<|audio|>``."""
        return self.tokenizer.convert_tokens_to_ids(AUDIO_TOKEN)

    @property
    def features(self) -> FeatureExtractor:
        """The function from a window's waveform to the encoder's features."""
        padded = self.audio_padding == "padded"
        return feature_extractor_of(self.audio_processor, padded=padded, raw=self.raw_features)

    @property
    def min_samples(self) -> int:
        """The shortest window that the encoder makes a frame of."""
        if self.least_samples is not None:
            return self.least_samples
        if self.convolution_layers is not None:
            return receptive_field(self.convolution_layers)
        extractor = self.features
        return extractor.min_samples if isinstance(extractor, StackedFilterbank) else 1

    def window_tokens(self, num_samples: int) -> list[int]:
        """Language model positions of each 30 s window of a clip."""
        lengths, chains = window_lengths(num_samples, self.min_samples), self._chains()
        frames = [max(chain_length(length, chain) for chain in chains) for length in lengths]
        return [num_audio_tokens(count, self.stack_factor) for count in frames]

    def _chains(self) -> Sequence[Chain]:
        if self.length_chains is not None:
            return self.length_chains
        if self.convolution_layers is not None:
            return [convolution_chain(self.convolution_layers)]
        extractor = self.features
        return [filterbank_chain(extractor.stride) if isinstance(extractor, StackedFilterbank) else MEL_CHAIN]

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        audio: Any = None,
        audios: Any = None,
        sampling_rate: int = SAMPLE_RATE,
        return_tensors: str | None = "pt",
        include_audio_num_chunks: bool = False,
        **_: Any,
    ) -> BatchFeature:
        """Make a batch.

        Args:
            text: one prompt or several, each with one ``<|audio|>`` for each of its clips.
            audio: the waveforms [sample] of all prompts, in order; `audios` is the same under its older name.
            sampling_rate: theirs; other than 16 kHz is refused.
            return_tensors: "pt"; anything else is refused.
            include_audio_num_chunks: also give each clip's number of windows.

        Returns:
            input_ids and attention_mask [row, token] (padded on the left), audio_values [window, channel, time],
            audio_lens (their time steps) and audio_token_len (their positions) [window], audio_num_chunks [clip].

        Raises:
            DataError: placeholders and clips differ in number; AudioError: a clip that is no mono waveform.
        """
        if return_tensors not in ("pt", None):
            raise DataError(f"return_tensors={return_tensors!r} is not supported: expected 'pt'")
        clips = _as_clips(audios if audio is None else audio, sampling_rate)
        data: dict[str, Any] = {}
        tokens_of_clip = []
        if clips:
            pieces = [list(windows(clip, self.min_samples)) for clip in clips]
            values = [self.features(window) for clip in pieces for window in clip]
            data["audio_values"], data["audio_lens"] = _pad_time(values)
            token_lengths = [self.window_tokens(len(clip)) for clip in clips]
            data["audio_token_len"] = torch.tensor([count for clip in token_lengths for count in clip])
            if include_audio_num_chunks:
                data["audio_num_chunks"] = torch.tensor([len(clip) for clip in token_lengths])
            tokens_of_clip = [sum(clip) for clip in token_lengths]
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            encoded = self.tokenizer(
                self._expand(texts, tokens_of_clip), add_special_tokens=False, padding=True, return_tensors="pt"
            )
            data = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], **data}
        return BatchFeature(data)

    def _expand(self, texts: list[str], tokens_of_clip: list[int]) -> list[str]:
        num_placeholders = sum(text.count(AUDIO_TOKEN) for text in texts)
        if num_placeholders != len(tokens_of_clip):
            raise DataError(
                f"{num_placeholders} {AUDIO_TOKEN} placeholders, {len(tokens_of_clip)} audio clips: "
                "give each clip exactly one placeholder"
            )
        before, behind = (AUDIO_START_TOKEN, AUDIO_END_TOKEN) if self.audio_boundaries else ("", "")
        counts = iter(tokens_of_clip)
        expanded = []
        for text in texts:
            first, *rest = text.split(AUDIO_TOKEN)
            clips = (before + self.audio_token_replacement * next(counts) + behind for _ in rest)
            expanded.append(first + "".join(clip + part for clip, part in zip(clips, rest, strict=True)))
        return expanded

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """The tokenizer's."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """The tokenizer's."""
        return self.tokenizer.decode(*args, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        """What `__call__` returns."""
        return ["input_ids", "attention_mask", "audio_values", "audio_lens", "audio_token_len", "audio_num_chunks"]

    def to_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """The content of processor_config.json; transformers.js reads it too."""
        content = {
            "processor_class": type(self).__name__,
            "version": PROCESSOR_VERSION,
            "audio_placeholder": AUDIO_TOKEN,
            "audio_padding": "longest",
            "encoder_ds_factor": 2 * HOP_LENGTH,
            "stack_factor": self.stack_factor,
        }
        if self.convolution_layers is not None:
            content["convolution_layers"] = [list(layer) for layer in self.convolution_layers]
        if self.audio_boundaries:
            content["audio_boundaries"] = True
        if self.length_chains is not None:
            content["length_chains"] = [[list(step) for step in chain] for chain in self.length_chains]
            content["min_samples"] = self.least_samples
        if self.audio_padding != "true_length":
            content["audio_padding"] = self.audio_padding
        if self.raw_features:
            content["raw_features"] = True
        return content

    def save_pretrained(self, save_directory: str | os.PathLike[str], **_: Any) -> list[str]:  # type: ignore[override]
        """Write the tokenizer, preprocessor_config.json and processor_config.json; returns their paths."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        files = list(self.tokenizer.save_pretrained(folder))
        settings = self.audio_processor.to_dict() | {"processor_class": type(self).__name__}
        for name, content in ((PREPROCESSOR_FILE, settings), (PROCESSOR_FILE, self.to_dict())):
            (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            files.append(name)
        names = sorted({Path(file).name for file in files} & set(os.listdir(folder)))
        write_manifest(folder, names)
        return [str(folder / name) for name in names]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> "UltravoxProcessor":  # type: ignore[override]
        """Read what `save_pretrained` wrote, from a folder or a hub id; never a base model's processor."""
        known = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")
        where = {name: kwargs[name] for name in known if kwargs.get(name) is not None}
        settings_file = cached_file(pretrained_model_name_or_path, PROCESSOR_FILE, **where)
        settings = json.loads(Path(settings_file).read_text(encoding="utf-8"))
        return cls(
            AutoFeatureExtractor.from_pretrained(pretrained_model_name_or_path, **where),
            AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **where),
            stack_factor=settings["stack_factor"],
            convolution_layers=settings.get("convolution_layers"),
            audio_boundaries=settings.get("audio_boundaries", False),
            length_chains=settings.get("length_chains"),
            min_samples=settings.get("min_samples"),
            audio_padding="padded" if settings.get("audio_padding") == "padded" else "true_length",
            raw_features=settings.get("raw_features", False),
        )


def add_special_token(tokenizer: Any, token: str = AUDIO_TOKEN) -> int:
    """Add ``<|audio|>`` or another as one special token, where it is not there yet; returns its id."""
    from transformers import AddedToken

    if token not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(token)


def _as_clips(audio: Any, sampling_rate: int) -> list[np.ndarray]:
    if audio is None:
        return []
    if sampling_rate != SAMPLE_RATE:
        raise AudioError(
            f"waveforms have {sampling_rate} samples per second: expected {SAMPLE_RATE}; "
            "load files with ultravox.audio.waveform.load_waveform"
        )
    is_one = isinstance(audio, np.ndarray | Tensor) and audio.ndim == 1
    clips = [np.asarray(clip, dtype=np.float32) for clip in ([audio] if is_one else audio)]
    for index, clip in enumerate(clips):
        if clip.ndim != 1 or len(clip) == 0:
            raise AudioError(f"audio clip {index} has shape {clip.shape}: expected mono samples, at least one")
        if not np.isfinite(clip).all():
            raise AudioError(f"audio clip {index} holds samples that are not numbers (NaN or infinite)")
    return clips


def _pad_time(values: list[Tensor]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([value.shape[-1] for value in values])
    padded = values[0].new_zeros(len(values), values[0].shape[0], int(lengths.max()))
    for row, value in zip(padded, values, strict=True):
        row[:, : value.shape[-1]] = value
    return padded, lengths


AutoProcessor.register(UltravoxConfig, UltravoxProcessor, exist_ok=True)
