"""Task `tune`: next-token cross-entropy through the language model, on the response."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ultravox.config.schema import StageConfig
from ultravox.data.collate import TokenBatch, collate_tokens, loss_mask
from ultravox.metrics.error_rate import character_errors, word_error_rate
from ultravox.metrics.token_predictions import count_predictions, pool_predictions
from ultravox.model.adapters import LoraLinear, lora_layers, merged_lora
from ultravox.model.fusion import check_counts
from ultravox.model.packing import Packer, find_packer
from ultravox.objectives.cross_entropy import best_tokens, cross_entropy_with_best, next_token_positions
from ultravox.training.batches import SpeechBatch
from ultravox.training.examples import Example, ExampleTable
from ultravox.training.speech import SpeechData
from ultravox.training.speech_task import SpeechTask
from ultravox.training.task import LossOutput

TokenRow = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Of a row's supervised positions: best tokens, labels, and places, each [position]."""


class TuneTask(SpeechTask):
    """Transcriptions and answers, each in its conversation."""

    parts = ("projector", "language_model", "audio_encoder")

    def __init__(self, model: Any, processor: Any, data: SpeechData, stage: StageConfig, seed: int) -> None:
        self.audio_token_id = int(model.config.audio_token_index)
        self._packer = find_packer(model.language_model, stage.packing)
        self.plan_mode = "padded" if self._packer is None else self._packer.plan_mode
        super().__init__(model, processor, data, stage, seed)
        self.pad_token_id = int(self.tokenizer.pad_token_id)

    def _select(self, examples: ExampleTable) -> tuple[ExampleTable, np.ndarray, np.ndarray]:
        """All examples. Each placeholder gives its place to the first position of its recording."""
        return examples, self.maker.planned_tokens(examples.lengths), examples.lengths.text_tokens

    def _loss(self, batch: SpeechBatch) -> LossOutput:
        """Sum of the supervised tokens' cross-entropies, and their number."""
        total, rows, num_tokens = self._forward(batch, training=True)
        predictions = pool_predictions([count_predictions(*row) for row in rows])
        return LossOutput(total, predictions.num_positions, batch.audio_seconds, num_tokens, predictions=predictions)

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
        )

    def _forward(self, batch: SpeechBatch, *, training: bool) -> tuple[Tensor, list[TokenRow], int]:
        """Sum of the losses, each row's best tokens beside its labels, and the positions without padding.

        Augmented and packed in training alone.
        """
        audio = self.audio_embeddings(batch, augmented=training) if len(batch.lengths) else None
        tokens = self.tokens(batch)
        inputs, labels, places, arguments = self._inputs(tokens, audio, self._packer if training else None)
        hidden = self.model.get_decoder()(inputs_embeds=inputs, use_cache=False, **arguments).last_hidden_state
        total, best = self._cross_entropy(hidden, labels)
        return total, _token_rows(best, labels, places, tokens.input_ids.shape[1]), tokens.num_tokens

    def evaluate(self) -> dict[str, float]:
        """See `Task`; also how well the next tokens of the kept-out clips are told, with their audio and another's."""
        metrics = super().evaluate()
        examples = self.data.progress_examples
        with torch.no_grad():
            return metrics | self._audio_use(self.first_versions(examples)) if len(examples) > 1 else metrics

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
        places = torch.arange(tokens.labels.numel()).view(tokens.labels.shape)
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
        rows = zip(batch.input_ids, batch.supervised, strict=True)
        prompts = [ids[: int(supervised.argmax())] for ids, supervised in rows]
        tokens = collate_tokens(
            batch.ids,
            prompts,
            [prompt != self.audio_token_id for prompt in prompts],
            batch.audio_tokens,
            audio_token_id=self.audio_token_id,
            pad_token_id=self.pad_token_id,
        )
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
        return self.tokenizer.batch_decode(output, skip_special_tokens=True)


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


def num_matmul_parameters(language_model: nn.Module) -> int:
    """Parameters of the language model that a token is multiplied with: without embeddings and adapters."""
    tables = {id(p) for m in language_model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    head = language_model.get_output_embeddings()  # type: ignore[operator]
    tables |= {id(parameter) for parameter in head.parameters()} if head is not None else set()
    tables |= {id(p) for layer in lora_layers(language_model).values() for p in (layer.lora_A, layer.lora_B)}
    return sum(parameter.numel() for parameter in language_model.parameters() if id(parameter) not in tables)
