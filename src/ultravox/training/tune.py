"""Task `tune`: next-token cross-entropy through the language model, on the response."""

import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ultravox.audio.augment import generator_for
from ultravox.audio.endpoints import ClipCutter
from ultravox.config.schema import StageConfig
from ultravox.data.collate import TokenBatch, collate_tokens, loss_mask
from ultravox.data.order import PlannedBatch, Position
from ultravox.errors import DataError
from ultravox.metrics.error_rate import character_errors, word_error_rate
from ultravox.metrics.token_predictions import count_predictions, pool_predictions
from ultravox.model.adapters import LoraLinear, merged_lora
from ultravox.model.boundaries import with_boundaries
from ultravox.model.fusion import check_counts
from ultravox.model.packing import Packer, find_packer
from ultravox.objectives.cross_entropy import best_tokens, cross_entropy_with_best, next_token_positions
from ultravox.objectives.token_losses import TokenWeights, token_losses_of_hidden
from ultravox.tokens import IGNORE_INDEX
from ultravox.training.audio_learning import EndOfAudio, NextFrames
from ultravox.training.batches import SpeechBatch
from ultravox.training.end_of_audio_look import end_of_audio_metrics
from ultravox.training.examples import Example, ExampleTable
from ultravox.training.speech import SpeechData
from ultravox.training.speech_task import SpeechTask
from ultravox.training.task import LossOutput
from ultravox.training.teacher import Teacher


@dataclass(frozen=True, slots=True)
class _States:
    """What the decoder made of a batch."""

    tokens: TokenBatch
    hidden: Tensor
    """[row, token, hidden], packed or not."""
    labels: Tensor
    """Of these places, [row, token]."""
    places: Tensor
    """Where each stands in the batch as it was before it was packed, [row, token]."""


TokenRow = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Of a row's supervised positions: best tokens, labels, and places, each [position]."""


class TuneTask(SpeechTask):
    """Transcriptions and answers, each in its conversation."""

    parts = ("projector", "language_model", "audio_encoder")

    def __init__(self, model: Any, processor: Any, data: SpeechData, stage: StageConfig, seed: int) -> None:
        self.audio_token_id = int(model.config.audio_token_index)
        self.boundary_ids: list[int] = getattr(model.config, "audio_boundary_ids", None) or []
        self._packer = find_packer(model.language_model, stage.packing)
        self.plan_mode = "padded" if self._packer is None else self._packer.plan_mode
        super().__init__(model, processor, data, stage, seed)
        self.pad_token_id = int(self.tokenizer.pad_token_id)
        options = stage.tune
        distillation = options.distillation
        self.weights = TokenWeights(
            options.cross_entropy_weight,
            options.label_smoothing,
            options.z_loss_weight,
            distillation.weight,
            distillation.temperature,
        )
        self.teacher: Teacher | None = None
        if distillation.weight:
            self.teacher = Teacher(model, options.loss_mask, round(distillation.teacher_cache_gb * 1e9))
            self.maker.with_text = True
        self.ending = self._end_of_audio()
        self.next_frames: NextFrames | None = None
        if options.next_frame.weight:
            self.next_frames = NextFrames(options.next_frame, model, self.features)
        heads = {
            "end_of_audio": None if self.ending is None else self.ending.head,
            "next_frame": None if self.next_frames is None else self.next_frames.module,
        }
        modules: dict[str, nn.Module] = {name: module for name, module in heads.items() if module is not None}
        if modules:
            self.extra, self.keeps_extra = nn.ModuleDict(modules).to(model.device), True

    def _end_of_audio(self) -> EndOfAudio | None:
        options = self.stage.tune.end_of_audio
        if not options.active:
            return None
        self.maker.cutter = ClipCutter(options.cut_share, options.pause_share)
        heard = self.audio_tokens[self.audio_tokens > 0]
        return EndOfAudio(options, self.model, self.tokenizer, float(heard.mean()) if len(heard) else 1.0)

    def _select(self, examples: ExampleTable) -> tuple[ExampleTable, np.ndarray, np.ndarray]:
        """All examples. Each placeholder gives its place to the first position of its recording."""
        text = examples.lengths.text_tokens
        if self.stage.tune.end_of_audio.variant == "late":
            more = EndOfAudio(self.stage.tune.end_of_audio, self.model, self.tokenizer, 1.0).more_tokens
            text = np.where(text > 0, text + more, 0).astype(np.int32)
        if self.boundary_ids:
            around = 2 * examples.lengths.num_recordings[:, None]
            text = np.where(text > 0, text + around, 0).astype(np.int32)
        return examples, self.maker.planned_tokens(examples.lengths), text

    def make_batch(self, planned: PlannedBatch, position: Position) -> SpeechBatch:
        """See `SpeechTask`; with the answers of clips that are cut, and tokens around the recordings."""
        share = self.stage.tune.boundary_share
        return self.prepared(super().make_batch(planned, position), 1.0 if share is None else share)

    def first_versions(self, examples: list[Example]) -> SpeechBatch:
        """See `SpeechTask`; with tokens around each recording, as inference writes them."""
        return self._bounded(super().first_versions(examples))

    def prepared(self, batch: SpeechBatch, share: float = 1.0) -> SpeechBatch:
        """What the objectives make of the batch's conversations."""
        return self._bounded(batch if self.ending is None else self.ending.dialogues(batch), share)

    def _bounded(self, batch: SpeechBatch, share: float = 1.0) -> SpeechBatch:
        """The batch with the two tokens around the recordings of its rows, or of a random share of them."""
        if not self.boundary_ids:
            return batch
        draws = torch.rand(len(batch.ids), generator=generator_for(*batch.augment_seed, "boundaries")).tolist()
        rows = zip(batch.input_ids, batch.supervised, draws, strict=True)
        found = [
            with_boundaries(ids, marks, self.audio_token_id, self.boundary_ids) if draw < share else (ids, marks)
            for ids, marks, draw in rows
        ]
        return replace(batch, input_ids=[ids for ids, _ in found], supervised=[marks for _, marks in found])

    def _loss(self, batch: SpeechBatch) -> LossOutput:
        """Sum over the supervised tokens, and over audio positions where they are learnt from too; and their number.

        A position counts by the weight of its objective, a token 1.
        """
        batch, hidden = (batch, None) if self.next_frames is None else self.next_frames.hide(batch)
        states = self._states(batch, training=True)
        output = LossOutput(states.hidden.new_zeros(()), 0, batch.audio_seconds, states.tokens.num_tokens)
        output.num_positions = states.places.numel()
        output.flops = self.audio_flops(batch) + self.flops.language_model(
            output.num_tokens, int((states.labels != IGNORE_INDEX).sum())
        )
        if self.weights.cross_entropy or self.weights.distillation:
            rows, output.sum, output.means = self._token_losses(states, batch)
            output.predictions = pool_predictions([count_predictions(*row) for row in rows])
            output.count = output.predictions.num_positions
            at_positions = self.stage.tune.end_of_audio.variant in ("early", "head") or self.next_frames is not None
            if self.weights.plain and at_positions:  # the loss is of more than these
                output.means = {"cross_entropy": (float(output.sum.detach()), output.count)}
        if self.ending is not None and self.stage.tune.end_of_audio.variant != "late":
            self._add(output, self.stage.tune.end_of_audio.weight, self.ending.loss(self._of_audio(states), batch))
        if self.next_frames is not None and hidden is not None:
            self._add(output, self.next_frames.options.weight, self.next_frames.loss(self._of_audio(states), hidden))
        return output

    def _idle(self) -> Tensor:
        """See `SpeechTask`: one token of zeros."""
        token = torch.full((1, 1), self.pad_token_id, device=self.model.device)
        inputs = self.model.embed(token).detach().requires_grad_()
        return self.model.get_decoder()(inputs_embeds=inputs, use_cache=False).last_hidden_state.sum() * 0

    @staticmethod
    def _add(output: LossOutput, weight: float, more: tuple[Tensor, int, dict[str, tuple[float, float]]]) -> None:
        total, count, means = more
        output.sum = output.sum + weight * total
        output.count += weight * count
        output.means |= means

    def _of_audio(self, states: "_States") -> Tensor:
        """The states at all audio positions, row after row as before the packing, [position, hidden]."""
        flat = (states.tokens.input_ids == self.audio_token_id).reshape(-1).nonzero().squeeze(1)
        slots = states.places.reshape(-1)
        where = torch.zeros(states.tokens.input_ids.numel(), dtype=torch.long, device=slots.device)
        where[slots[slots >= 0]] = (slots >= 0).nonzero().squeeze(1)
        return states.hidden.reshape(-1, states.hidden.shape[-1])[where[flat]]

    def _token_losses(
        self, states: "_States", batch: SpeechBatch
    ) -> tuple[list[TokenRow], Tensor, dict[str, tuple[float, float]]]:
        """Each row's best tokens, the sum of the losses, and the sums and counts of its parts for the log."""
        width = states.tokens.input_ids.shape[1]
        if self.weights.plain:
            total, best = self._cross_entropy(states.hidden, states.labels)
            return _token_rows(best, states.labels, states.places, width), total, {}
        positions, targets = next_token_positions(states.labels)
        chosen = states.hidden.reshape(-1, states.hidden.shape[-1]).index_select(0, positions)
        where = states.places.reshape(-1)[positions + 1]
        teacher = emphasis = None
        if self.teacher is not None:
            teacher, emphasis = self._teacher_states(self.teacher, batch, where, targets)
        losses = token_losses_of_hidden(
            chosen,
            targets,
            self.weights,
            self.model.logits_of,
            teacher_hidden=teacher,
            teacher_logits_of=None if self.teacher is None else self.teacher.logits,
            emphasis=emphasis,
            frozen_head=not self.model.output_layer_trains,
        )
        count = float(len(targets))
        parts = {"cross_entropy": (float(losses.cross_entropy), count)}
        if teacher is not None:
            parts["distillation"] = (float(losses.distillation), count)
        return _token_rows(losses.best, states.labels, states.places, width), losses.total, parts

    def _teacher_states(
        self, teacher: Teacher, batch: SpeechBatch, where: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the teacher says at the student's positions, which stand at `where` in the batch; and their emphasis."""
        asked = [teacher.targets(dialogue) for dialogue in batch.as_text]
        order = where.argsort()
        mine = targets[order].cpu().numpy()
        if not np.array_equal(np.concatenate(asked), mine):
            raise DataError(
                f"teacher and student are asked about different tokens in a batch with {batch.ids[0]}: the chat "
                "template writes an answer otherwise when the user's turn is another one; choose another template"
            )
        emphasis = torch.ones(len(mine))
        emphasis[np.cumsum([len(tokens) for tokens in asked]) - 1] = self.stage.tune.distillation.end_of_turn_weight
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)  # of each position among the rows' own
        return teacher.hidden(batch.as_text)[place], emphasis.to(targets.device)[place]

    def _forward(self, batch: SpeechBatch, *, training: bool) -> tuple[Tensor, list[TokenRow], int]:
        """Sum of the cross-entropies, each row's best tokens beside its labels, and the positions without padding.

        Augmented and packed in training alone.
        """
        states = self._states(batch, training=training)
        total, best = self._cross_entropy(states.hidden, states.labels)
        width = states.tokens.input_ids.shape[1]
        return total, _token_rows(best, states.labels, states.places, width), states.tokens.num_tokens

    def tokens(self, batch: SpeechBatch) -> TokenBatch:
        """A batch's conversations, each placeholder as often as its recording has positions, and what is supervised."""
        kind = self.stage.tune.loss_mask
        rows = zip(batch.input_ids, batch.supervised, strict=True)
        return collate_tokens(
            batch.ids,
            batch.input_ids,
            [loss_mask(ids, supervised, self.audio_token_id, kind) for ids, supervised in rows],
            batch.audio_tokens,
            audio_token_id=self.audio_token_id,
            pad_token_id=self.pad_token_id,
            silent=[not whole for whole in batch.whole],
        ).to(self.model.device)

    def _states(self, batch: SpeechBatch, *, training: bool) -> "_States":
        """The decoder's last states of a batch."""
        audio = self.audio_embeddings(batch, augmented=training) if len(batch.lengths) else None
        if audio is not None:
            batch = self.counted(batch, audio[1])
        tokens = self.tokens(batch)
        inputs, labels, places, arguments = self._inputs(tokens, audio, self._packer if training else None)
        if self.is_sharded and training and not inputs.requires_grad:
            inputs.requires_grad_()  # text alone: the layers are gathered on the way back too, as on the other ranks
        hidden = self.model.get_decoder()(inputs_embeds=inputs, use_cache=False, **arguments).last_hidden_state
        return _States(tokens, hidden, labels, places)

    def evaluate(self) -> dict[str, float]:
        """See `Task`; also how well the next tokens of the kept-out clips are told, with their audio and another's."""
        metrics = super().evaluate()
        examples = self.data.progress_examples
        if len(examples) < 2:
            return metrics
        with torch.no_grad():
            metrics |= self._audio_use(self.first_versions(examples))
            single = [example for example in examples if len(example.recordings) == 1]
            if self.ending is not None and len(single) > 1:
                metrics |= end_of_audio_metrics(self, single)
        return metrics

    def _audio_use(self, batch: SpeechBatch) -> dict[str, float]:
        """Teacher-forced figures, and what is lost with the next clip's audio. Rows have one recording each."""
        if any(len(counts) != 1 for counts in batch.audio_tokens):
            return {}
        total, rows, _ = self._forward(batch, training=False)
        swapped_total, swapped_rows, _ = self._forward(_with_text_of_next(batch), training=False)
        counts, swapped = (pool_predictions([count_predictions(*r) for r in many]) for many in (rows, swapped_rows))
        said, meant = ([self._decode(row[part]) for row in rows] for part in (0, 1))
        return {
            "kept_out_loss": float(total) / counts.num_positions,
            "kept_out_token_accuracy": counts.accuracy(),
            "swapped_token_accuracy": swapped.accuracy(),
            "audio_use_margin": float(swapped_total - total) / counts.num_positions,
            "wer_tf": word_error_rate(meant, said),
            "cer_tf": character_errors(meant, said).rate,
        }

    def _decode(self, tokens: np.ndarray) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _inputs(
        self, tokens: TokenBatch, audio: tuple[Tensor, Tensor] | None, packer: Packer | None
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """Embeddings [row, token, hidden], labels [row, token], and what else the language model is told.

        Between the two last: where each token stands in the batch as it was before it was packed, [row, token].
        """
        heard = audio or ()
        places = torch.arange(tokens.labels.numel(), device=tokens.labels.device).view(tokens.labels.shape)
        if packer is None:
            # Padding is on the right, where a causal model cannot look from: no mask is needed; attention is faster.
            return self.model.embed(tokens.input_ids, *heard), tokens.labels, places, {}
        if audio is not None:
            check_counts((tokens.input_ids == self.audio_token_id).sum(1), audio[1])  # while rows can be named
        packed = packer.pack(tokens.mask)
        joined = self.model.embed(tokens.input_ids[tokens.mask][None], *heard)[0]
        labels = packed.place_labels(tokens.labels, tokens.mask)
        return packed.place(joined), labels, packed.place(places[tokens.mask], -1), packed.arguments

    def _cross_entropy(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The sum, and the best token for each supervised position."""
        head = self.model.get_output_embeddings()
        text = self.model.config.text_config
        scaled = any(getattr(text, name, None) for name in ("logits_scaling", "logit_scale", "final_logit_softcapping"))
        if isinstance(head, nn.Linear) and not isinstance(head, LoraLinear) and not scaled:
            return cross_entropy_with_best(hidden, labels, head.weight, head.bias)
        logits, targets = self.model.supervised_logits(hidden, labels)
        total = nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
        return total, best_tokens(logits.detach())[1]

    def transcribe(self, examples: list[Example]) -> list[str]:
        """Greedy decoding of the answers, all at once."""
        batch = self.first_versions(examples)
        embeddings, token_lengths = self.audio_embeddings(batch, augmented=False)
        batch = self.counted(batch, token_lengths)
        rows = zip(batch.input_ids, batch.supervised, strict=True)
        prompts = [ids[: int(supervised.argmax())] for ids, supervised in rows]
        tokens = collate_tokens(
            batch.ids,
            prompts,
            [prompt != self.audio_token_id for prompt in prompts],
            batch.audio_tokens,
            audio_token_id=self.audio_token_id,
            pad_token_id=self.pad_token_id,
        ).to(self.model.device)
        inputs = self.model.embed(tokens.input_ids, embeddings, token_lengths)
        order = torch.argsort(tokens.mask.long(), dim=1, stable=True)  # the padding to the left
        inputs = torch.gather(inputs, 1, order[:, :, None].expand_as(inputs))
        longest = max(len(example.transcript) for example in examples)
        generation = copy.deepcopy(self.model.generation_config)
        generation.max_new_tokens, generation.do_sample = longest + 8, False
        with merged_lora(self.model):
            output = self.model.language_model.generate(
                inputs_embeds=inputs,
                attention_mask=torch.gather(tokens.mask, 1, order).long(),
                generation_config=generation,
            )
        texts: list[str] = self.tokenizer.batch_decode(output, skip_special_tokens=True)
        ending = self.stage.tune.end_of_audio
        if ending.variant == "late":
            texts = [text.rstrip().removesuffix(ending.end_suffix.strip()).rstrip() for text in texts]
        return texts


def _token_rows(best: Tensor, labels: Tensor, places: Tensor, width: int) -> list[TokenRow]:
    """Best tokens and labels of each sequence; `width` = of the batch in which `places` count."""
    positions, targets = next_token_positions(labels)
    where, order = places.reshape(-1)[positions + 1].sort()
    rows = (where // width).cpu().numpy()
    arrays = (best[order].cpu().numpy(), targets[order].cpu().numpy(), where.cpu().numpy())
    cuts = np.flatnonzero(np.diff(rows)) + 1
    return list(zip(*(np.split(array, cuts) for array in arrays), strict=True))


def _with_text_of_next(batch: SpeechBatch) -> SpeechBatch:
    """Each row's recording with the conversation of the row after it."""
    ids, supervised = batch.input_ids, batch.supervised
    return replace(batch, input_ids=[*ids[1:], ids[0]], supervised=[*supervised[1:], supervised[0]])
