"""Task `tune`: next-token cross-entropy through the language model, on the response."""

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ultravox.config.schema import StageConfig
from ultravox.data.collate import collate_tokens, loss_mask
from ultravox.model.adapters import lora_layers, merged_lora
from ultravox.model.fast_attention import Packing, takes_packed_rows
from ultravox.objectives.cross_entropy import cross_entropy
from ultravox.training.speech import Example, SpeechData
from ultravox.training.speech_task import SpeechBatch, SpeechTask
from ultravox.training.task import LossOutput


class TuneTask(SpeechTask):
    """Transcriptions and answers, each in its conversation."""

    parts = ("projector", "language_model", "audio_encoder")

    def __init__(self, model: Any, processor: Any, data: SpeechData, stage: StageConfig, seed: int) -> None:
        self.audio_token_id = int(model.config.audio_token_index)
        self._packs = takes_packed_rows(model.get_decoder())
        self.budget_counts_padding = not self._packs
        super().__init__(model, processor, data, stage, seed)
        self.pad_token_id = int(self.tokenizer.pad_token_id)
        self._masks: dict[int, np.ndarray] = {}
        for example in self.examples:
            self.prepare(example)

    def _select(self, examples: list[Example]) -> tuple[list[Example], list[list[int]]]:
        """All examples; their length is text and audio together."""
        rows = [
            [len(e.input_ids) - 1 + self.audio_tokens(e, version) for version in range(len(e.names))] for e in examples
        ]
        width = max(map(len, rows), default=0)
        return examples, [row + [0] * (width - len(row)) for row in rows]

    def prepare(self, example: Example) -> None:
        """Where its loss counts."""
        kind = self.stage.tune.loss_mask
        self._masks[id(example)] = loss_mask(example.input_ids, example.supervised, self.audio_token_id, kind)

    def loss(self, batch: SpeechBatch) -> LossOutput:
        """Sum of the supervised tokens' cross-entropies, and their number."""
        embeddings, token_lengths = self.audio_embeddings(batch, augmented=True)
        counts = [[self.audio_tokens(e, v)] for e, v in zip(batch.examples, batch.versions, strict=True)]
        tokens = collate_tokens(
            batch.ids,
            [example.input_ids for example in batch.examples],
            [self._masks[id(example)] for example in batch.examples],
            counts,
            audio_token_id=self.audio_token_id,
            pad_token_id=self.pad_token_id,
        )
        inputs = self.model.embed(tokens.input_ids, embeddings, token_lengths)
        hidden = self._hidden_states(inputs, tokens.mask)
        total, count = self._cross_entropy(hidden, tokens.labels)
        return LossOutput(total, count, batch.audio_seconds, tokens.num_tokens)

    def _hidden_states(self, inputs: Tensor, mask: Tensor) -> Tensor:
        """Last hidden states of right-padded sequences, [row, token, hidden]."""
        decoder = self.model.get_decoder()
        if self._packs:
            packing = Packing.of(mask)
            output = decoder(inputs_embeds=packing.pack(inputs), use_cache=False, **packing.arguments(inputs))
            return packing.unpack(output.last_hidden_state)
        # Padding is on the right, where a causal model cannot look from: no mask is needed, and attention is faster.
        return decoder(inputs_embeds=inputs, use_cache=False).last_hidden_state

    def _cross_entropy(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, int]:
        head = self.model.get_output_embeddings()
        text = self.model.config.text_config
        scaled = any(getattr(text, name, None) for name in ("logits_scaling", "logit_scale", "final_logit_softcapping"))
        if isinstance(head, nn.Linear) and not scaled:
            return cross_entropy(hidden, labels, head.weight, head.bias)
        logits, targets = self.model.supervised_logits(hidden, labels)
        return nn.functional.cross_entropy(logits.float(), targets, reduction="sum"), len(targets)

    def transcribe(self, examples: list[Example]) -> list[str]:
        """Greedy decoding of the answers, all at once."""
        batch = self.load(examples, [0] * len(examples))
        embeddings, token_lengths = self.audio_embeddings(batch, augmented=False)
        prompts = [e.input_ids[: int(e.supervised.argmax())] for e in examples]
        tokens = collate_tokens(
            batch.ids,
            prompts,
            [prompt != self.audio_token_id for prompt in prompts],
            [[self.audio_tokens(example, 0)] for example in examples],
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


def num_matmul_parameters(language_model: nn.Module) -> int:
    """Parameters of the language model that a token is multiplied with: without embeddings and adapters."""
    tables = {id(p) for m in language_model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    head = language_model.get_output_embeddings()  # type: ignore[operator]
    tables |= {id(parameter) for parameter in head.parameters()} if head is not None else set()
    tables |= {id(p) for layer in lora_layers(language_model).values() for p in (layer.lora_A, layer.lora_B)}
    return sum(parameter.numel() for parameter in language_model.parameters() if id(parameter) not in tables)
