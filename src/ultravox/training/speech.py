"""What the tasks train on: clips with their tokens, and the features of each at each speed.

With a frozen encoder the features are its frames, read from the cache. Where anything in the encoder trains, they are
what the encoder eats, cached just the same, and the encoder runs in every step.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from ultravox.audio.augment import augment_frames, generator_for
from ultravox.audio.features import NormalizedWaveform, windows
from ultravox.audio.lengths import MAX_WINDOW_SAMPLES
from ultravox.config.data import AugmentConfig, SourceConfig
from ultravox.config.schema import RunConfig
from ultravox.data.cache import CacheKey, CacheReport, FeatureCache, FeatureRequest
from ultravox.data.collate import WindowSlots, pad_frames
from ultravox.data.fingerprint import fingerprint
from ultravox.data.manifest import Clip
from ultravox.data.prompts import Task, messages_for, render
from ultravox.data.sources import load_clips
from ultravox.errors import DataError
from ultravox.metrics.normalize import normalize_english, spoken_form
from ultravox.training.progress import bar

#: Clips of this length are looked at while training, where there are enough.
PROGRESS_SECONDS = (1.0, 6.0)


@dataclass(slots=True)
class Example:
    """One clip, tokenised once. A version is the clip at one speed."""

    id: str
    source: str
    text: str
    repeat: int
    input_ids: np.ndarray
    """The conversation with one audio placeholder, [token]."""
    supervised: np.ndarray
    """True on what the assistant says, [token]."""
    transcript: np.ndarray
    """Tokens of the text alone, [token]."""
    names: list[str] = field(default_factory=list)
    """Entry of the cache for each version."""
    window_frames: list[list[int]] = field(default_factory=list)
    """Encoder frames of each window of each version."""
    seconds: list[float] = field(default_factory=list)


class Features:
    """Encoder frames of examples, from the cache or from the encoder itself."""

    def __init__(self, model: Any, dtype: str) -> None:
        self.model, self.encoder = model, model.audio_tower
        self.live = any(parameter.requires_grad for parameter in self.encoder.parameters())
        extractor = self.encoder.feature_extractor
        preprocessing = f"{type(extractor).__name__}-{extractor.version}"
        if isinstance(extractor, NormalizedWaveform):  # neither weights nor configuration of the encoder tell
            preprocessing += "-normalized" if extractor.normalize else "-raw"
        if self.live:
            channels = int(self.encoder.features(np.zeros(1600, dtype=np.float32)).shape[0])
            key = CacheKey("features only", preprocessing, channels, "float32")
        else:
            key = CacheKey(module_hash(self.encoder), preprocessing, self.encoder.hidden_size, dtype)
        self.cache = FeatureCache(key)
        steps = extractor.length if self.live else self.encoder.output_length
        longest = MAX_WINDOW_SAMPLES + self.encoder.min_samples - 1
        self.slots = WindowSlots(full=steps(MAX_WINDOW_SAMPLES), slot=steps(longest))

    def encode(self, waveforms: list[np.ndarray]) -> list[np.ndarray]:
        """Waveforms to what the cache keeps of them, each [frame, channel]."""
        least = self.encoder.min_samples
        pieces = [[self.encoder.features(window) for window in windows(waveform, least)] for waveform in waveforms]
        if self.live:
            return [self.slots.join([feature.T.numpy() for feature in piece]) for piece in pieces]
        flat = [feature for piece in pieces for feature in piece]
        lengths = torch.tensor([feature.shape[-1] for feature in flat])
        values = flat[0].new_zeros(len(flat), flat[0].shape[0], int(lengths.max()))
        for row, feature in zip(values, flat, strict=True):
            row[:, : feature.shape[-1]] = feature
        with torch.inference_mode():
            frames, frame_lengths = self.model.encode_audio(values, lengths)
        rows = [row[:length].float().numpy() for row, length in zip(frames, frame_lengths.tolist(), strict=True)]
        found: Iterator[np.ndarray] = iter(rows)
        return [self.slots.join([next(found) for _ in piece]) for piece in pieces]

    def window_frames(self, name: str) -> list[int]:
        """Encoder frames of each window of a cached clip."""
        steps = self.slots.lengths(self.cache.num_frames(name))
        return self.encoder.frame_lengths(torch.tensor(steps)).tolist() if self.live else steps

    def load(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """What the cache keeps of clips: rows [window, step, channel] padded, and lengths [window]."""
        return pad_frames([window for name in names for window in self.slots.split(self.cache.frames(name))])

    def frames(self, values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """What `load` gave → encoder frames [window, frame, hidden] and lengths, with a gradient where it trains."""
        if not self.live:
            return values, lengths
        return self.model.encode_audio(values.transpose(1, 2), lengths)


def augment(
    frames: Tensor, lengths: Tensor, options: AugmentConfig, seed: tuple[int | str, ...], frames_per_second: int
) -> Tensor:
    """Augmented frames, as a pure function of `seed`."""
    if not (options.time_masks or options.channel_masks or options.noise_std):
        return frames
    return augment_frames(
        frames.clone() if frames.requires_grad else frames,
        lengths,
        generator_for(*seed),
        time_masks=options.time_masks,
        max_time_mask_frames=round(options.max_time_mask_seconds * frames_per_second),
        channel_masks=options.channel_masks,
        max_channel_mask_share=options.max_channel_mask_share,
        noise_std=options.noise_std,
    )


def module_hash(module: torch.nn.Module) -> str:
    """Hex SHA-256 of a module's weights and configuration."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    config = getattr(module, "config", None)
    if config is not None:
        content = {key: value for key, value in config.to_dict().items() if not key.startswith("_")}
        content.pop("transformers_version", None)
        digest.update(json.dumps(content, sort_keys=True, default=str).encode())
    return digest.hexdigest()


@dataclass(slots=True)
class SpeechData:
    """All examples of a run, those kept out for a look at progress, and how they were come by."""

    examples: list[Example]
    progress_examples: list[Example]
    features: Features
    report: CacheReport
    fingerprints: dict[str, str]
    """Source → hash of its clips, their audio and their tokens: what a resume must find unchanged."""
    seconds: float
    """Of audio, at speed 1."""
    trainable: dict[str, torch.nn.Parameter]
    """What trains in any stage of the run."""


def prepare_speech(config: RunConfig, model: Any, processor: Any) -> SpeechData:
    """Load clips, keep a few out, cache features, tokenise.

    Raises:
        DataError: too many clips that cannot be used, or none left.
    """
    data = config.data
    clips: list[Sourced] = []
    parts: dict[str, list[str]] = {}
    for source in data.sources:
        mine = load_clips(source.name, source.split)[: source.max_clips]
        parts[_key(source)] = [part for clip in mine for part in (clip.id, clip.text, clip.answer or "")]
        clips += [(source, clip) for clip in mine]
    progress, training = _keep_out(clips, config.evaluation.num_progress_clips)

    versions = [(source, clip, speed) for source, clip in training for speed in source.speeds or data.speeds]
    versions += [(source, clip, 1.0) for source, clip in progress]
    requests = [FeatureRequest(clip.audio, clip.duration, speed) for _, clip, speed in versions]
    features = Features(model, data.feature_dtype)
    limits = {"min_seconds": data.min_audio_seconds, "max_seconds": data.max_audio_seconds}
    title = "computing log-mel features" if features.live else "encoding speech once"
    with bar(title) as on_progress:
        report = features.cache.build(requests, features.encode, **limits, on_progress=on_progress)

    found: dict[int, Example] = {}
    for (source, clip, speed), name in zip(versions, report.names, strict=True):
        parts[_key(source)].append(name or "")
        if reason := _unusable(source, clip):
            report.quarantine(reason, clip.audio)
        elif name is not None:
            if id(clip) not in found:
                found[id(clip)] = _tokenise(source, clip, processor, data.transcript_style)
                parts[_key(source)] += _tokens(found[id(clip)])
            example = found[id(clip)]
            example.names.append(name)
            example.window_frames.append(features.window_frames(name))
            example.seconds.append(clip.duration / speed)
    report.require(data.max_quarantine_share, len(clips))
    examples = [found[id(clip)] for _, clip in training if id(clip) in found]
    if not examples:
        raise DataError("no clip is left to train on: check data.sources and the length limits")
    seconds = sum(clip.duration for _, clip in training if id(clip) in found)
    progress_examples = [found[id(clip)] for _, clip in progress if id(clip) in found]
    fingerprints = {key: fingerprint(strings) for key, strings in parts.items()}
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return SpeechData(examples, progress_examples, features, report, fingerprints, seconds, trainable)


def _key(source: SourceConfig) -> str:
    """What a source is called among the fingerprints; no two of a run are called the same."""
    return f"{source.name}/{source.split}/{source.task}"


def _tokens(example: Example) -> list[str]:
    """An example's tokens, for the fingerprint of its source."""
    return [array.tobytes().hex() for array in (example.input_ids, example.supervised, example.transcript)]


def _unusable(source: SourceConfig, clip: Clip) -> str | None:
    """Why a clip's text cannot be trained on, if so."""
    if not normalize_english(clip.text):
        return "without text"
    return "without answer" if source.task == "answer" and not (clip.answer or "").strip() else None


Sourced = tuple[SourceConfig, Clip]


def _keep_out(clips: list[Sourced], count: int) -> tuple[list[Sourced], list[Sourced]]:
    """A fixed few clips of the first transcribed source for "WER so far", chosen by hash; and all without their texts.

    They come from the training split, at most a tenth of it: the held-out split stays unseen. Clips of a few words are
    preferred, since one long clip would be most of the words and of the time that decoding takes.
    """
    first = next((source for source, _ in clips if source.task == "transcription"), None)
    candidates = [(source, clip) for source, clip in clips if source is first and normalize_english(clip.text)]
    candidates.sort(key=lambda pair: hashlib.sha256(pair[1].id.encode()).digest())
    count = min(count, len(candidates) // 10)
    handy = [pair for pair in candidates if PROGRESS_SECONDS[0] <= pair[1].duration <= PROGRESS_SECONDS[1]]
    progress = (handy if len(handy) >= count else candidates)[:count]
    texts = {normalize_english(clip.text) for _, clip in progress}
    return progress, [(source, clip) for source, clip in clips if normalize_english(clip.text) not in texts]


def _tokenise(source: SourceConfig, clip: Clip, processor: Any, style: Literal["written", "spoken"]) -> Example:
    text = spoken_form(clip.text) if style == "spoken" else clip.text
    input_ids, supervised = render(processor.tokenizer, messages_for(replace(clip, text=text), cast(Task, source.task)))
    ids = np.asarray(input_ids, dtype=np.int64)
    if (count := int((ids == processor.audio_token_index).sum())) != 1:
        raise DataError(f"the prompt of {clip.id} has {count} <|audio|> tokens, expected 1: is one in its text?")
    # With a space in front, a word is the same token at the beginning as in the middle: CTC has fewer to tell apart.
    transcript = np.asarray(processor.tokenizer.encode(f" {text}", add_special_tokens=False), dtype=np.int64)
    return Example(
        clip.id, source.name, clip.text, int(source.repeat or 1), ids, np.asarray(supervised, dtype=bool), transcript
    )
