"""What `tune` may learn at the audio's own positions: where the speaker has finished, and what comes next."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ultravox.audio.augment import generator_for
from ultravox.audio.lengths import SAMPLE_RATE, num_audio_tokens
from ultravox.config.objectives import EndOfAudioOptions, NextFrameOptions
from ultravox.errors import ConfigError
from ultravox.objectives.end_of_audio import StopHead, counted_positions, end_labels
from ultravox.objectives.next_frame import NextFrame, mask_positions, predicted_pairs, standardise
from ultravox.objectives.token_losses import TokenWeights, token_losses_of_hidden
from ultravox.training.batches import SpeechBatch
from ultravox.training.features import Features

#: Steps of a spectrogram beside a hidden stretch that are hidden too: their windows reach into it.
OVERLAP_STEPS = 2

Means = dict[str, tuple[float, float]]


class EndOfAudio:
    """One variant of learning where the speaker has finished."""

    def __init__(self, options: EndOfAudioOptions, model: Any, tokenizer: Any, mean_positions: float) -> None:
        """Args:
        options: of the stage; active.
        model: an `UltravoxModel`.
        tokenizer: of its language model.
        mean_positions: audio positions of a clip in the stage's data.

        Raises:
            ConfigError: of the early variant, a text that is not one token.
        """
        self.options, self.model, self._tokenizer = options, model, tokenizer
        self.head: StopHead | None = None
        if options.variant == "early":
            self.end_id, self.middle_id = (self._one_token(name) for name in ("end_text", "middle_text"))
            if self.end_id == self.middle_id:
                raise ConfigError("end_of_audio: end_text and middle_text are the same token; choose two")
        elif options.variant == "head":
            positives = min(options.last_positions, mean_positions) * (1 - options.cut_share)
            shown = mean_positions
            if options.middle_positions is not None:
                shown = min(mean_positions, options.last_positions + options.middle_positions)
            self.head = StopHead(model.config.text_config.hidden_size, max(1e-3, shown - positives) / positives)

    def _one_token(self, name: str) -> int:
        text = getattr(self.options, name)
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            raise ConfigError(
                f"end_of_audio.{name} {text!r} is {len(ids)} tokens of this language model, but one is said at each "
                "position: choose another text"
            )
        return int(ids[0])

    def _ids(self, text: str) -> np.ndarray:
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False), dtype=np.int64)

    @property
    def more_tokens(self) -> int:
        """By how much an answer may grow."""
        options = self.options
        if options.variant != "late":
            return 0
        return max(len(self._ids(options.end_suffix)), len(self._ids(options.cut_text)))

    def dialogues(self, batch: SpeechBatch) -> SpeechBatch:
        """The batch with the answers that belong to whole and to cut clips; what a cut clip says in all, nobody knows.

        Late: the suffix, or the text of a cut clip alone. Else: nothing is supervised where the clip was cut.
        """
        ids, supervised = list(batch.input_ids), list(batch.supervised)
        for row, whole in enumerate(batch.whole):
            if not batch.audio_tokens[row]:
                continue
            if self.options.variant == "late":
                ids[row], supervised[row] = self.answer(ids[row], supervised[row], whole)
            elif not whole:
                supervised[row] = np.zeros_like(supervised[row])
        return replace(batch, input_ids=ids, supervised=supervised)

    def answer(self, ids: np.ndarray, supervised: np.ndarray, whole: bool) -> tuple[np.ndarray, np.ndarray]:
        """Late: a dialogue whose last answer says whether the clip is whole, before the tokens that end the turn."""
        said = np.flatnonzero(supervised)
        start = int(said[np.flatnonzero(np.diff(said, prepend=-2) > 1)[-1]])
        special = np.flatnonzero(np.isin(ids[start:], self._tokenizer.all_special_ids))
        end = start + int(special[0]) if len(special) else int(said[-1]) + 1
        kept = ids[:end] if whole else ids[:start]
        added = self._ids(self.options.end_suffix if whole else self.options.cut_text)
        found = np.concatenate([kept, added, ids[end:]])
        marks = np.concatenate([supervised[: len(kept)], np.ones(len(added), dtype=bool), supervised[end:]])
        return found, marks

    def loss(self, states: Tensor, batch: SpeechBatch) -> tuple[Tensor, int, Means]:
        """Early, head: sum over audio positions, their number, and what is logged.

        Args:
            states: of all audio positions of the batch, row after row, [position, hidden].
            batch: with `whole`.
        """
        counts = torch.tensor([sum(row) for row in batch.audio_tokens])
        labels = end_labels(counts, torch.tensor(batch.whole), self.options.last_positions)
        generator = generator_for(*batch.augment_seed, "end of audio")
        chosen = counted_positions(counts, self.options.last_positions, self.options.middle_positions, generator)
        # of several recordings in one row, only the last is the speaker's end, and none is cut
        chosen &= torch.repeat_interleave(torch.tensor([len(row) == 1 for row in batch.audio_tokens]), counts)
        labels, states = labels[chosen], states[chosen.to(states.device)]
        if self.head is not None:
            logits = self.head(states)
            total, count = self.head.loss(logits, labels.to(states.device))
            said = logits > 0
        else:
            targets = torch.where(labels, self.end_id, self.middle_id).to(states.device)
            frozen = not self.model.output_layer_trains
            found = token_losses_of_hidden(states, targets, TokenWeights(), self.model.logits_of, frozen_head=frozen)
            total, count, said = found.total, len(targets), found.best == self.end_id
        right = float((said.cpu() == labels).sum())
        return total, count, {"end_of_audio": (total.item(), count), "end_of_audio_position_accuracy": (right, count)}

    def scores(self, states: Tensor) -> Tensor:
        """Early, head: probability at each audio position that the speaker has finished, [position]."""
        if self.head is not None:
            return self.head(states).sigmoid()
        logits = self.model.logits_of(states)[:, [self.end_id, self.middle_id]].float()
        return logits.softmax(-1)[:, 0]

    def answer_scores(self, logits: Tensor) -> Tensor:
        """Late: the probability that a clip is whole, from the logits of the answer's first token, [row]."""
        cut = int(self._ids(self.options.cut_text)[0])
        return 1 - logits.float().softmax(-1)[:, cut]


@dataclass(frozen=True, slots=True)
class Hidden:
    """What of a batch's audio is hidden, and what it was."""

    counts: Tensor
    """Positions of each window, [window]."""
    mask: Tensor
    """Of all windows' positions, bool [position]."""
    targets: Tensor
    """[position, channel]."""
    seed: tuple[int | str, ...]


class NextFrames:
    """Hiding parts of the audio from the encoder, and predicting them."""

    def __init__(self, options: NextFrameOptions, model: Any, features: Features) -> None:
        """Args:
        options: of the stage.
        model: an `UltravoxModel`.
        features: of its encoder.

        Raises:
            ConfigError: a target that the encoder does not have, or that would move with what is trained.
        """
        self.options, self.model, self.features = options, model, features
        encoder = model.audio_tower
        channels = int(encoder.features(np.zeros(SAMPLE_RATE, dtype=np.float32)).shape[0])
        self.is_waveform = channels == 1
        stack = model.config.stack_factor
        self.steps_per_frame = round(encoder.feature_extractor.length(SAMPLE_RATE) / encoder.frames_per_second)
        if options.target == "log_mel":
            if self.is_waveform:
                raise ConfigError(
                    "next_frame.target log_mel needs an encoder that is given a spectrogram, and this one hears the "
                    "waveform: set target: encoder"
                )
            size = channels * self.steps_per_frame * stack
        else:
            if features.trains:
                raise ConfigError(
                    "next_frame.target encoder needs a frozen audio encoder: one that trains could make all its frames "
                    "alike, which are easily predicted; set target: log_mel"
                )
            size = encoder.hidden_size
        negatives = options.num_negatives if options.form == "contrastive" else None
        hidden_size = model.config.text_config.hidden_size
        self.module = NextFrame(hidden_size, size, num_negatives=negatives, temperature=options.similarity_temperature)

    def hide(self, batch: SpeechBatch) -> tuple[SpeechBatch, Hidden]:
        """The batch with stretches of its audio silenced, and what they were. A pure function of the batch's place."""
        stack = self.model.config.stack_factor
        counts = num_audio_tokens(self.model.audio_tower.frame_lengths(batch.lengths), stack)
        seed = (*batch.augment_seed, "next frame")
        options = self.options
        mask = mask_positions(counts, options.mask_share, options.mask_positions, generator_for(*seed))
        targets = self._log_mel(batch, counts) if options.target == "log_mel" else self._frames(batch, counts)
        values = batch.values.clone()
        steps = self.steps_per_frame * stack
        overlap = 0 if self.is_waveform else OVERLAP_STEPS
        start = 0
        for row, count in zip(values, counts.tolist(), strict=True):
            quiet = 0.0 if self.is_waveform else float(row.min())
            for position in mask[start : start + count].nonzero().squeeze(1).tolist():
                row[max(0, position * steps - overlap) : (position + 1) * steps + overlap] = quiet
            start += count
        return replace(batch, values=values), Hidden(counts, mask, standardise(targets), seed)

    def _log_mel(self, batch: SpeechBatch, counts: Tensor) -> Tensor:
        """Each position's spectrogram, what is past a clip's end as quiet as it gets."""
        steps = self.steps_per_frame * self.model.config.stack_factor
        found = []
        for row, length, count in zip(batch.values, batch.lengths.tolist(), counts.tolist(), strict=True):
            padded = F.pad(row[:length], (0, 0, 0, max(0, count * steps - length)), value=float(row.min()))
            found.append(padded[: count * steps].reshape(count, -1))
        return torch.cat(found)

    def _frames(self, batch: SpeechBatch, counts: Tensor) -> Tensor:
        """The mean of the frozen encoder's frames of each position, of the audio as it is."""
        stack = self.model.config.stack_factor
        with torch.no_grad():
            frames, lengths = self.model.encode_audio(batch.values.transpose(1, 2), batch.lengths)
        found = []
        for row, length, count in zip(frames, lengths.tolist(), counts.tolist(), strict=True):
            padded = F.pad(row[:length], (0, 0, 0, count * stack - length)).view(count, stack, -1)
            sizes = (length - torch.arange(count) * stack).clamp(max=stack)
            found.append(padded.sum(1) / sizes[:, None].to(padded))
        return torch.cat(found)

    def loss(self, states: Tensor, hidden: Hidden) -> tuple[Tensor, int, Means]:
        """Sum over predicted positions, their number, and what is logged.

        Args:
            states: of all audio positions, window after window, [position, hidden].
            hidden: as `hide` gives it.
        """
        said, meant = (
            pair.to(states.device) for pair in predicted_pairs(hidden.counts, hidden.mask, self.options.steps_ahead)
        )
        if not len(said):
            return states.new_zeros(()), 0, {}
        generator = generator_for(*hidden.seed, "negatives")
        total, copied, count = self.module.loss(states[said], hidden.targets.to(states.device), said, meant, generator)
        return total, count, {"next_frame": (total.item(), count), "next_frame_copied": (copied.item(), count)}
