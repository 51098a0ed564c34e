"""What the tasks on speech have in common: batches of examples, features, parameter groups, the trainable state."""

import abc
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ultravox.audio.effects import EffectSettings, WaveformAugmenter
from ultravox.audio.waveform import load_waveform
from ultravox.config.schema import StageConfig
from ultravox.data.fingerprint import fingerprint
from ultravox.data.mixture import Mixture
from ultravox.data.order import DataOrder, PlannedBatch, Position
from ultravox.data.plan import Limits, Mode
from ultravox.data.stream_order import StreamOrder
from ultravox.errors import CheckpointError, DataError
from ultravox.metrics.error_rate import character_errors, word_error_rate
from ultravox.metrics.overlap import bleu, chrf, sacrebleu_is_installed
from ultravox.training.batches import BatchMaker, SpeechBatch
from ultravox.training.engines.shards import assign
from ultravox.training.examples import Example, ExampleTable
from ultravox.training.features import augment
from ultravox.training.flops import ModelFlops
from ultravox.training.memory_model import MemoryModel, OfLongest
from ultravox.training.optim import ParameterGroup
from ultravox.training.rows import source_key
from ultravox.training.speech import SpeechData
from ultravox.training.task import LossOutput, Transcript

BEGINNING = Position()
PARTS = {
    "projector": ("multi_modal_projector.", "audio_boundaries.", "layer_mix."),
    "language_model": ("language_model.",),
    "audio_encoder": ("audio_tower.",),
}


class SpeechTask(abc.ABC):
    """A task on a model that hears. Subclasses choose the examples, their lengths and the loss."""

    parts: tuple[str, ...]
    """Parts of the model that this objective trains, where they train at all."""
    plan_mode: Mode = "padded"
    """How the plan fills `max_batch_tokens`."""
    takes_text = True
    """Whether rows of text alone are of any use."""

    def __init__(self, model: Any, processor: Any, data: SpeechData, stage: StageConfig, seed: int) -> None:
        self.model, self.tokenizer, self.data, self.stage, self.seed = model, processor.tokenizer, data, stage, seed
        self.features = data.features
        self.trainable = data.trainable
        self.extra: nn.Module | None = None
        """Parameters of the objective itself."""
        self.keeps_extra = False
        """Whether they are of use after training."""
        self._transcripts: list[Transcript] = []
        self.is_sharded = False
        """Whether each rank must run the decoder forwards and backwards as often as the others."""
        self.left_out: list[str] = []
        """The example of each version that this objective cannot use."""
        wanted = np.array([stage.sources is None or source.name in stage.sources for source in data.sources])
        chosen = data.examples.subset(wanted[data.examples.sources])
        waveform = stage.augment.waveform
        augmenter = WaveformAugmenter(EffectSettings(**waveform.model_dump())) if waveform.active else None
        self.maker = self._maker(chosen, from_cache=data.uses_cache(stage), augmenter=augmenter)
        self.examples, self.audio_tokens, self.text_tokens = self._select(chosen)
        self.maker.examples = self.examples
        self.order = self._planned(Limits(stage.max_batch_tokens, self.plan_mode))
        self.memory: MemoryModel | None = None

    def limit_memory(self, memory: MemoryModel, max_bytes: int) -> None:
        """Plan anew, with batches that are predicted to take no more than `max_bytes` beside what is in use before."""
        self.memory = memory
        self.order = self._planned(Limits(self.stage.max_batch_tokens, self.plan_mode, OfLongest(memory), max_bytes))

    def _planned(self, limits: Limits) -> DataOrder | StreamOrder:
        if self.data.stream is not None:
            return self.data.stream.order(self._select, limits, seed=self.seed, sources=self.stream_sources)
        try:
            return DataOrder(
                self.audio_tokens,
                self.text_tokens,
                self._mixture(),
                limits,
                seed=self.seed,
                fingerprint=fingerprint([repr(self.data.fingerprints), self.examples.numbers.tobytes().hex()]),
            )
        except DataError as error:
            raise DataError(f"stage {self.stage.name}: {error}") from error

    @property
    def stream_sources(self) -> list[int]:
        """Which of data.sources the stage reads, where they are streams."""
        named = self.stage.sources
        chosen = enumerate(self.data.sources)
        return [i for i, s in chosen if (named is None or s.name in named) and (self.takes_text or s.task != "text")]

    def epoch_uids(self) -> dict[str, list[str]]:
        """Of streams: see `SpeechStream.epoch_uids`. For an audit; the order begins anew."""
        return {} if self.data.stream is None else self.data.stream.epoch_uids(self._select, self.stream_sources)

    def _mixture(self) -> Mixture:
        """How often the chosen examples of each source come."""
        counts = Counter(self.examples.sources.tolist())
        sources = {source_key(self.data.sources[index]): index for index in sorted(counts)}
        sizes = {key: counts[index] for key, index in sources.items()}
        configs = {key: self.data.sources[index] for key, index in sources.items()}
        if (temperature := self.data.temperature) is not None:
            return Mixture(sizes, temperature=temperature, seed=self.seed)
        if weights := {key: source.weight for key, source in configs.items() if source.weight is not None}:
            return Mixture(sizes, weights=weights, seed=self.seed)
        repeats = {key: 1.0 if source.repeat is None else source.repeat for key, source in configs.items()}
        return Mixture(sizes, repeats=repeats, seed=self.seed)

    @abc.abstractmethod
    def _select(self, examples: ExampleTable) -> tuple[ExampleTable, np.ndarray, np.ndarray]:
        """The examples that can be trained on, in their order, and their lengths.

        Lengths: audio tokens [example, version] and text tokens [example, prompt]; 0 = that one is left out.
        """

    def loss(self, batch: SpeechBatch) -> LossOutput:
        """See `Task`. DataError when too many recordings of the run could not be decoded."""
        self.data.set_aside(batch.faults, batch.num_rows, batch.epoch)
        if batch.ids:
            return self._loss(batch)
        return LossOutput(self._idle() if self.is_sharded else torch.zeros(()), 0, 0.0, 0)

    def _idle(self) -> Tensor:
        """0, after the passes through sharded layers that the other ranks make with their batches."""
        return torch.zeros(())

    @abc.abstractmethod
    def _loss(self, batch: SpeechBatch) -> LossOutput:
        """Forward pass of a batch that is not empty."""

    @abc.abstractmethod
    def transcribe(self, examples: list[Example]) -> list[str]:
        """What the model makes of each example's first version."""

    def batch(self, position: Position = BEGINNING) -> SpeechBatch:
        """One batch, made here and now."""
        return self.make_batch(self.order.batch(*position), position)

    def make_batch(self, planned: PlannedBatch, position: Position) -> SpeechBatch:
        """The batch at a place of the plan: a pure function of the two."""
        batch = self.maker.planned(planned, position.epoch)
        batch.augment_seed = (self.seed, self.stage.name, *position)
        return batch

    def halves(self, batch: SpeechBatch) -> list[SpeechBatch]:
        """See `Task`."""
        return batch.halves()

    def first_versions(self, examples: list[Example]) -> SpeechBatch:
        """Examples at their first speed, with their first prompt, as they are."""
        return self._maker(examples, from_cache=self.data.cached).first()

    def _maker(
        self, examples: Sequence[Example], *, from_cache: bool, augmenter: WaveformAugmenter | None = None
    ) -> BatchMaker:
        return BatchMaker(
            examples,
            self.features,
            self.model.config.stack_factor,
            from_cache=from_cache,
            audio_limits=(self.data.min_audio_seconds, self.data.max_audio_seconds),
            augmenter=augmenter,
            seed=self.seed,
        )

    def audio_embeddings(self, batch: SpeechBatch, *, augmented: bool) -> tuple[Tensor, Tensor]:
        """Projected audio of a batch that has some: [window, token, hidden] and lengths [window]."""
        frames, lengths = self.features.frames(batch.values, batch.lengths, encoded=batch.encoded)
        if augmented:
            rate = self.model.audio_tower.frames_per_second
            frames = augment(frames, lengths, self.stage.augment, batch.augment_seed, rate)
        device = self.model.device
        return self._project(frames.to(device, non_blocking=True), lengths.to(device, non_blocking=True))

    def _project(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        projected: tuple[Tensor, Tensor] = self.model.project(frames, lengths)
        return projected

    @cached_property
    def flops(self) -> ModelFlops:
        """What a position takes. Asked once it is known what trains."""
        return ModelFlops(self.model)

    def audio_flops(self, batch: SpeechBatch) -> float:
        """Of the batch's recordings, until the language model hears them."""
        in_step = 0.0 if batch.encoded else self.flops.encoder(batch.audio_seconds)
        return in_step + self.flops.projector(sum(map(sum, batch.audio_tokens)))

    def counted(self, batch: SpeechBatch, token_lengths: Tensor) -> SpeechBatch:
        """The batch with the positions that its windows have, where the projector decides how many."""
        if not self.model.multi_modal_projector.compresses:
            return batch
        steps = batch.lengths if batch.encoded else self.model.audio_tower.frame_lengths(batch.lengths)
        planned = self.model.multi_modal_projector.token_lengths(steps)
        return batch.with_positions(planned.tolist(), token_lengths.tolist())

    def stream_state(self, position: Position) -> dict[str, Any] | None:
        """What `go_to` needs beside a position; None where a position says all."""
        return self.order.state(position) if isinstance(self.order, StreamOrder) else None

    def go_to(self, position: Position, stream_state: dict[str, Any] | None) -> None:
        """Before the first batch: let the plan begin at a position. CheckpointError when it is another stream's."""
        if isinstance(self.order, StreamOrder) and stream_state is not None:
            self.order.go_to(position, stream_state)

    def mixture(self, position: Position) -> dict[str, dict[str, float]]:
        """Of each source, the share of the examples that was asked for, and what it is over all whole epochs.

        Streams have epochs of their own: theirs is the share up to the position.
        """
        if isinstance(self.order, StreamOrder):
            return self.order.mixture(position)
        mixture = self.order.mixture
        counts = dict(zip(mixture.names, mixture.drawn_before(max(1, position.epoch)), strict=True))
        total = sum(counts.values())
        return {
            name: {"requested": mixture.requested[name], "realised": count / total} for name, count in counts.items()
        }

    def parameter_groups(self) -> list[ParameterGroup]:
        """What trains in this stage; a part with rate 0 stands still."""
        groups = []
        for part in self.parts:
            lr = getattr(self.stage.optim.lr, part)
            found = {name: p for name, p in self.trainable.items() if name.startswith(PARTS[part])}
            if not self.takes_text:  # nothing stands around the audio
                found = {name: p for name, p in found.items() if not name.startswith("audio_boundaries.")}
            if part == "projector" and self.extra is not None:
                found |= {f"objective.{name}": p for name, p in self.extra.named_parameters()}
            if lr > 0 and found:
                groups.append(ParameterGroup(part, found, lr))
        training = {name for group in groups for name in group.parameters}
        for name, parameter in self.trainable.items():
            parameter.requires_grad_(name in training)
        return groups

    def train_mode(self) -> None:
        """Dropout where the base models have it; a frozen encoder stays as it is for inference."""
        self.model.train()
        self.model.audio_tower.train(self.features.trains)

    def evaluate(self) -> dict[str, float]:
        """Error rates, BLEU and chrF of what the model makes of the clips that were kept out of training."""
        examples = self.data.progress_examples
        if not examples:
            return {}
        self.model.eval()
        with torch.no_grad():
            texts = self.transcribe(examples)
        self._transcripts = [
            Transcript(example.id, example.text, text, partial(_only_recording, example))
            for example, text in zip(examples, texts, strict=True)
        ]
        references = [example.text for example in examples]
        metrics = {"wer": word_error_rate(references, texts), "cer": character_errors(references, texts).rate}
        if sacrebleu_is_installed():
            metrics |= {"bleu": bleu(references, texts)[0], "chrf": chrf(references, texts)[0]}
        return metrics

    def transcripts(self) -> Sequence[Transcript]:
        """See `Task`."""
        return self._transcripts

    def trainable_state(self) -> dict[str, Tensor]:
        """All that trains in any stage, and the objective's own parameters; sharded as they are."""
        state = {name: parameter.detach() for name, parameter in self.trainable.items()}
        if self.extra is not None:
            state |= {f"objective.{name}": p.detach() for name, p in self.extra.named_parameters()}
        return state

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Undo `trainable_state`. CheckpointError when names or shapes differ."""
        current = {name: parameter.detach() for name, parameter in self.trainable.items()}
        if self.extra is not None:
            current |= {f"objective.{name}": p.detach() for name, p in self.extra.named_parameters()}
        if odd := sorted(set(current) ^ set(state)):
            where = "only in the checkpoint" if odd[0] in state else "missing in the checkpoint"
            raise CheckpointError(f"the checkpoint does not fit the model: {odd[0]} is {where} ({len(odd)} such)")
        with torch.no_grad():
            for name, tensor in current.items():
                if tensor.shape != state[name].shape:
                    raise CheckpointError(f"{name} has shape {list(state[name].shape)}, expected {list(tensor.shape)}")
                assign(tensor, state[name])


def _only_recording(example: Example) -> np.ndarray | None:
    """Decoded, of a row that has one."""
    return load_waveform(example.recordings[0]) if len(example.recordings) == 1 else None
