"""Bugs as they happen, planted into the real pipeline: each a function that gets pytest's monkeypatch."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import torch

from ultravox.audio.features import LogMel
from ultravox.data import loader
from ultravox.data.order import DataOrder
from ultravox.data.templates import PromptTemplate
from ultravox.model import downsample
from ultravox.model.adapters import lora_layers
from ultravox.model.audio_encoder import WhisperAudioEncoder
from ultravox.model.packing import Packer
from ultravox.model.projector import SwigluProjector
from ultravox.objectives.alignment import CtcAlignment
from ultravox.tokens import IGNORE_INDEX
from ultravox.training import features, teacher, tune
from ultravox.training.batches import BatchMaker
from ultravox.training.optim import Optimizer
from ultravox.training.speech_task import SpeechTask
from ultravox.training.task import LossOutput
from ultravox.training.tune import TuneTask


def rolled(labels: torch.Tensor, places: int) -> torch.Tensor:
    """Labels moved to the left (places < 0) or right within their row."""
    moved = torch.full_like(labels, IGNORE_INDEX)
    if places < 0:
        moved[:, :places] = labels[:, -places:]
    else:
        moved[:, places:] = labels[:, :-places]
    return moved


def double_shift(patch):
    """Shifted in the collator, and once more where the loss is computed."""
    right = TuneTask._cross_entropy
    patch.setattr(TuneTask, "_cross_entropy", lambda self, hidden, labels: right(self, hidden, rolled(labels, -1)))


def missing_shift(patch):
    """Each position is trained to say its own token."""
    right = TuneTask._cross_entropy
    patch.setattr(TuneTask, "_cross_entropy", lambda self, hidden, labels: right(self, hidden, rolled(labels, 1)))


def match_over_the_batch(patch):
    """The alignment's distances to the rows are a mean over all positions of the batch, times its tokens."""

    def loss(self, audio_embeddings, token_lengths, targets, target_lengths):
        weight, self.match_weight = self.match_weight, 0.0
        total, ctc, count = right(self, audio_embeddings, token_lengths, targets, target_lengths)
        self.match_weight = weight
        flat = audio_embeddings[torch.arange(audio_embeddings.shape[1]) < token_lengths[:, None]]
        with torch.no_grad():
            expected = self.scores(flat).softmax(-1) @ torch.cat([self.blank[None], self.rows])
        return total + weight * (flat - expected).square().mean() / self.variance * count, ctc, count

    right = CtcAlignment.loss
    patch.setattr(CtcAlignment, "loss", loss)


def detached_projector(patch):
    right = SwigluProjector.forward

    def forward(self, frames, frame_lengths):
        embeddings, lengths = right(self, frames, frame_lengths)
        return embeddings.detach(), lengths

    patch.setattr(SwigluProjector, "forward", forward)


def deaf_projector(patch):
    """Every position of every clip gets one and the same embedding."""
    right = SwigluProjector.forward

    def forward(self, frames, frame_lengths):
        return right(self, torch.ones_like(frames), frame_lengths)

    patch.setattr(SwigluProjector, "forward", forward)


def zero_rate(patch):
    right = Optimizer.step
    patch.setattr(Optimizer, "step", lambda self, **options: right(self, **options | {"lr_factor": 0.0}))


def swapped_pairs(patch):
    """The recording of a row is looked up by the number of the row before it."""
    right = BatchMaker._make

    def make(self, choices, epoch, copies):
        made = right(self, choices, epoch, copies)
        if len(made.lengths) < 2:
            return made
        order = torch.arange(len(made.lengths)).roll(1)
        last = made.audio_tokens[-1:] + made.audio_tokens[:-1]
        return replace(made, values=made.values[order], lengths=made.lengths[order], audio_tokens=last)

    patch.setattr(BatchMaker, "_make", make)


def masked_end(patch):
    right = tune.loss_mask

    def loss_mask(ids, supervised, audio_token_id, kind):
        mask = right(ids, supervised, audio_token_id, kind).copy()
        mask[np.flatnonzero(mask)[-1]] = False
        return mask

    patch.setattr(tune, "loss_mask", loss_mask)


def supervised_prompt(patch):
    patch.setattr(tune, "loss_mask", lambda ids, supervised, audio_token_id, kind: ids != audio_token_id)


def nothing_supervised(patch):
    patch.setattr(tune, "loss_mask", lambda ids, supervised, audio_token_id, kind: np.zeros(len(ids), dtype=bool))


def flipped_mel(patch):
    """The mel bins in the other order."""
    right = LogMel.__call__
    patch.setattr(LogMel, "__call__", lambda self, waveform: right(self, waveform).flip(0))


def other_filterbank(patch):
    """Filters on HTK's mel scale instead of Slaney's."""
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(201, 80, 0.0, 8000.0, 16000, norm="slaney", mel_scale="htk")
    patch.setattr("ultravox.audio.features._mel_filters", lambda bins: torch.from_numpy(filters.T).float())


def everything_frozen(patch):
    patch.setattr(SpeechTask, "parameter_groups", lambda self: [])


def frozen_projector(patch):
    right = SpeechTask.parameter_groups

    def groups(self):
        return [group for group in right(self) if group.part != "projector"]

    patch.setattr(SpeechTask, "parameter_groups", groups)


def frozen_that_changes(patch):
    """A step that also writes into the language model's table."""
    right = Optimizer.step

    def step(self, **options):
        norm = right(self, **options)
        Optimizer.table.add_(1e-3)
        return norm

    embed = SpeechTask.audio_embeddings

    def audio_embeddings(self, batch, *, augmented):
        Optimizer.table = self.model.get_input_embeddings().weight.data
        return embed(self, batch, augmented=augmented)

    patch.setattr(Optimizer, "step", step)
    patch.setattr(Optimizer, "table", None, raising=False)
    patch.setattr(SpeechTask, "audio_embeddings", audio_embeddings)


def packed_without_borders(patch):
    """Packed rows under one plain causal mask: each sees those before it."""
    right = Packer.pack

    def pack(self, mask):
        packed = right(self, mask)
        positions = torch.arange(packed.shape[1]).expand(packed.shape)
        return replace(packed, arguments={"position_ids": positions, "attention_mask": None})

    patch.setattr(Packer, "pack", pack)


def padding_heard(patch):
    """The encoder takes its padding for sound."""
    right = WhisperAudioEncoder.encode

    def forward(self, features, feature_lengths, **options):
        full = torch.full_like(feature_lengths, features.shape[-1])
        return right(self, features, full, **options)[0], self.frame_lengths(feature_lengths)

    patch.setattr(WhisperAudioEncoder, "encode", forward)


def one_placeholder_too_many(patch):
    right = BatchMaker.audio_tokens
    patch.setattr(BatchMaker, "audio_tokens", lambda self, frames: right(self, frames) + 1)


def loud_embeddings(patch):
    right = SwigluProjector.init_scale
    patch.setattr(SwigluProjector, "init_scale", lambda self, rms: right(self, 100 * rms))


def leaked_text(patch):
    """The prompt says what it asks for, after the audio."""
    right = PromptTemplate.messages

    def messages(self, clip, prompt_index):
        made = right(self, clip, prompt_index)
        return [
            message | {"content": message["content"] + f" {clip.text}"} if message["role"] == "user" else message
            for message in made
        ]

    patch.setattr(PromptTemplate, "messages", messages)


def nan_gradient(patch):
    """A square root at 0, which is finite forwards and not backwards."""
    right = TuneTask._loss

    def loss(self, batch):
        output = right(self, batch)
        output.sum = output.sum + (output.sum - output.sum).clamp(min=0).sqrt()
        return output

    patch.setattr(TuneTask, "_loss", loss)


def averaged_averages(patch):
    right = TuneTask._loss

    def loss(self, batch):
        output = right(self, batch)
        return LossOutput(output.sum / output.count, 1, output.audio_seconds, output.num_tokens)

    patch.setattr(TuneTask, "_loss", loss)


def rate_without_bound(patch):
    right = Optimizer.step
    patch.setattr(
        Optimizer, "step", lambda self, **options: right(self, **options | {"lr_factor": 3e3 * options["lr_factor"]})
    )


def dealt_out_twice(patch):
    """Each rank gets its share of a share."""
    right = loader.rank_slice

    def rank_slice(step, num_micro_batches, rank, world_size):
        mine = right(step, num_micro_batches, rank, world_size)
        return mine[: -(-len(mine) // world_size)]

    patch.setattr(loader, "rank_slice", rank_slice)


def epoch_ignored(patch):
    right = DataOrder.batch
    patch.setattr(DataOrder, "batch", lambda self, epoch, window, index: right(self, 0, window, index))


def teacher_with_adapters(patch):
    patch.setattr(teacher, "without_adapters", nullcontext)


def inverted_time_masks(patch):
    """What a mask was to hide is all that is left."""
    right = features.augment_frames

    def augment_frames(frames, *arguments, **options):
        before = frames.clone()
        masked = right(frames, *arguments, **options)
        hidden = (masked == 0).all(-1, keepdim=True)
        return torch.where(hidden, before, torch.zeros(()))

    patch.setattr(features, "augment_frames", augment_frames)


def noise_of_another_scale(patch):
    right = features.augment_frames

    def augment_frames(*arguments, noise_std, **options):
        return right(*arguments, noise_std=100 * noise_std, **options)

    patch.setattr(features, "augment_frames", augment_frames)


def targets_without_blank(patch):
    """The rows of the tokens begin at 0, which is the blank's."""
    right = CtcAlignment.targets
    patch.setattr(CtcAlignment, "targets", lambda self, token_ids: (right(self, token_ids) - 1).clamp(min=1))


def merged_for_good(patch):
    """Adapters are merged for generation and stay in the weights."""
    right = tune.merged_lora

    @contextmanager
    def merged(module):
        with right(module):
            layers = {name: layer.weight.detach().clone() for name, layer in lora_layers(module).items()}
            yield
        for name, layer in lora_layers(module).items():
            layer.weight.data = layers[name]

    patch.setattr(tune, "merged_lora", merged)


def compounding_rate(patch):
    """The schedule's factor falls on the rate of the step before instead of the peak."""
    right = Optimizer.step

    def step(self, *, lr_factor, **options):
        before = dict(self.rates)
        peaks = {group.part: group.lr for group in self.groups}
        for group in self._rule.optimizer.param_groups:
            group["peak"] = before[group["part"]]
        norm = right(self, lr_factor=lr_factor, **options)
        for group in self._rule.optimizer.param_groups:
            group["peak"] = peaks[group["part"]]
        return norm

    patch.setattr(Optimizer, "step", step)


def next_token_seen(patch):
    """The causal mask of packed rows lets each token see the one after it."""
    right = Packer.pack

    def pack(self, mask):
        packed = right(self, mask)
        rows = mask.sum(1).tolist()
        row = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows))
        row = torch.nn.functional.pad(row, (0, packed.shape[1] - len(row)), value=-1)
        place = torch.arange(len(row))
        seen = (row[:, None] == row[None, :]) & (place[:, None] + 1 >= place[None, :])
        bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        positions = packed.arguments["position_ids"]
        return replace(packed, arguments={"position_ids": positions, "attention_mask": bias[None, None]})

    patch.setattr(Packer, "pack", pack)


def frames_in_another_order(patch):
    """A position is made of frames far apart, and of which depends on the padding."""

    def stack_frames(frames, stack_factor):
        clips, length, channels = frames.shape
        tokens = -(-length // stack_factor)
        frames = torch.nn.functional.pad(frames, (0, 0, 0, tokens * stack_factor - length))
        frames = frames.reshape(clips, stack_factor, tokens, channels).transpose(1, 2)
        return frames.reshape(clips, tokens, channels * stack_factor)

    patch.setattr(downsample, "stack_frames", stack_frames)


BUGS = {
    double_shift: 5,
    missing_shift: 5,
    detached_projector: 6,
    deaf_projector: 8,
    zero_rate: 6,
    swapped_pairs: 1,
    masked_end: 1,
    supervised_prompt: 1,
    nothing_supervised: 1,
    flipped_mel: 1,
    other_filterbank: 1,
    everything_frozen: 6,
    frozen_projector: 6,
    frozen_that_changes: 6,
    packed_without_borders: 10,
    padding_heard: 10,
    one_placeholder_too_many: 2,
    loud_embeddings: 4,
    leaked_text: 1,
    nan_gradient: 6,
    averaged_averages: 14,
    rate_without_bound: 13,
    dealt_out_twice: 15,
    epoch_ignored: 15,
    merged_for_good: 8,
    teacher_with_adapters: 16,
    inverted_time_masks: 17,
    noise_of_another_scale: 17,
    targets_without_blank: 18,
    compounding_rate: 7,
    next_token_seen: 5,
    frames_in_another_order: 10,
}
"""Each with the check that must name it."""
