"""A stage's largest batch, through a model without weights: what it holds at most, and how much work it is."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ultravox.audio.lengths import MAX_WINDOW_SAMPLES, SAMPLE_RATE
from ultravox.config.schema import StageConfig
from ultravox.errors import ConfigError
from ultravox.estimate.peak import PeakMemory
from ultravox.estimate.skeleton import with_memory
from ultravox.model.modeling import UltravoxModel
from ultravox.objectives.cross_entropy import best_tokens
from ultravox.training.flops import ModelFlops

PROMPT_TOKENS = 20
"""Of a conversation, before its answer."""
ALIGN_ROWS = 2000
"""Tokens that the transcripts of a run are made of, which `align` scores each position against."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The largest batch of a stage, of rows that are all alike."""

    rows: int
    audio_tokens: int
    """Of a row."""
    text_tokens: int
    """Of a row."""
    seconds: float
    """Of a row's audio."""
    activation_bytes: int
    """Most that is held beside weights, gradients and the optimizer's state, forwards and backwards."""
    flops: float
    """Of the model's matrix products, forwards and backwards."""

    @property
    def tokens(self) -> int:
        """Positions of all rows."""
        return self.rows * (self.audio_tokens + self.text_tokens)


def largest_batch(model: UltravoxModel, stage: StageConfig, clip_seconds: float, text_tokens: int) -> Batch:
    """Run it, in `weightless`.

    Args:
        model: a skeleton, whose parameters say whether they train.
        stage: whose batch it is.
        clip_seconds: of each row.
        text_tokens: of each row of a `tune` stage, prompt and answer.

    Raises:
        ConfigError: not one such row fits into the stage's batch, or it is longer than a window.
    """
    work = BatchWork(model, stage, clip_seconds, text_tokens)
    memory = PeakMemory()
    work.prepare()
    for tensor in (*model.parameters(), *model.buffers()):
        memory.ignore(tensor)
        if tensor.grad is not None:
            memory.ignore(tensor.grad)
    with memory:
        work()
    return Batch(work.rows, work.audio_tokens, work.text_tokens, clip_seconds, memory.peak, work.flops())


class BatchWork:
    """A stage's largest batch, to be run forwards and backwards; of silence and of one word, which take as long."""

    def __init__(self, model: UltravoxModel, stage: StageConfig, clip_seconds: float, text_tokens: int) -> None:
        """See `largest_batch`; the model may also be a real one."""
        tower = model.audio_tower
        self.model, self.seconds = model, clip_seconds
        num_samples = round(clip_seconds * SAMPLE_RATE)
        if num_samples > MAX_WINDOW_SAMPLES:
            raise ConfigError(
                f"--clip-seconds {clip_seconds:g}: longer audio is cut into windows of "
                f"{MAX_WINDOW_SAMPLES / SAMPLE_RATE:g} s, each of which is encoded by itself: give that at most"
            )
        self._length = tower.output_length(num_samples)
        with with_memory():
            self._features = tuple(torch.as_tensor(tower.features(np.zeros(num_samples, dtype=np.float32))).shape)
        with torch.no_grad():
            frames = torch.zeros(1, self._length, tower.hidden_size, dtype=model.dtype)
            self.audio_tokens = model.project(frames, torch.tensor([self._length]))[0].shape[1]
        self.aligns = stage.objective == "align"
        self.text_tokens = 0 if self.aligns else text_tokens
        self.supervised = max(1, text_tokens - PROMPT_TOKENS)
        tokens = self.audio_tokens + self.text_tokens
        self.rows = stage.max_batch_tokens // tokens
        if self.rows < 1:
            raise ConfigError(
                f"stage {stage.name}: a clip of {clip_seconds:g} s with {self.text_tokens} tokens of text takes "
                f"{tokens} positions, more than max_batch_tokens {stage.max_batch_tokens}: raise it, or lower "
                "--clip-seconds"
            )
        self.encodes = any(parameter.requires_grad for parameter in tower.parameters())

    def prepare(self) -> None:
        """As in training, in a micro-batch that is not the first of its step: gradients are there already."""
        self.model.train()
        self.model.audio_tower.train(self.encodes)
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

    def __call__(self) -> None:
        """Forwards and backwards."""
        self._align_loss().backward() if self.aligns else self._tune_loss().backward()

    def flops(self) -> float:
        """Of the model's matrix products."""
        flops = ModelFlops(self.model)
        work = flops.projector(self.rows * self.audio_tokens)
        if self.encodes:
            work += flops.encoder(self.rows * self.seconds)
        if self.aligns:
            return work + 4.0 * self.rows * self.audio_tokens * self.model.config.text_config.hidden_size * ALIGN_ROWS
        tokens = self.rows * (self.audio_tokens + self.text_tokens)
        return work + flops.language_model(tokens, self.rows * self.supervised)

    def _audio(self) -> Tensor:
        """Embeddings [row, audio token, hidden]."""
        model, dtype = self.model, self.model.dtype
        if self.encodes:
            features = torch.zeros(self.rows, *self._features, dtype=dtype)
            frames, lengths = model.encode_audio(features, torch.tensor([self._features[-1]] * self.rows))
        else:  # computed once, before training
            frames = torch.zeros(self.rows, self._length, model.audio_tower.hidden_size, dtype=dtype)
            lengths = torch.tensor([self._length] * self.rows)
        projected: Tensor = model.project(frames, lengths)[0]
        return projected

    def _tune_loss(self) -> Tensor:
        """As `ultravox.objectives.cross_entropy` sums it on a GPU."""
        model, audio = self.model, self._audio()
        words = model.get_input_embeddings()(torch.zeros(self.rows, self.text_tokens, dtype=torch.long))
        inputs = torch.cat([audio, words], 1)
        del audio, words
        hidden = model.get_decoder()(inputs_embeds=inputs, use_cache=False).last_hidden_state
        chosen = hidden[:, -self.supervised :].reshape(-1, hidden.shape[-1])
        logits = model.logits_of(chosen)
        total = F.cross_entropy(logits.float(), torch.zeros(len(chosen), dtype=torch.long), reduction="sum")
        best_tokens(logits.detach())
        return total

    def _align_loss(self) -> Tensor:
        """Scores of the embeddings against the transcripts' tokens, in float32; their gradient is as large as CTC's."""
        audio = self._audio().float()
        rows = torch.zeros(ALIGN_ROWS + 1, audio.shape[-1], dtype=torch.float32)
        return F.log_softmax(audio @ rows.T, dim=-1).exp().sum()
