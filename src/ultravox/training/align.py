"""Task `align`: CTC through the language model's own embedding rows. The language model itself does not run."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ultravox.config.schema import StageConfig
from ultravox.errors import CheckpointError, DataError
from ultravox.model.ctc_projector import CtcProjector
from ultravox.objectives.alignment import CtcAlignment
from ultravox.training.batches import SpeechBatch
from ultravox.training.examples import Example, ExampleTable, unique_tokens
from ultravox.training.speech import SpeechData
from ultravox.training.speech_task import SpeechTask
from ultravox.training.task import LossOutput

TOKEN_IDS = "objective.token_ids"


class AlignTask(SpeechTask):
    """Every clip's transcript, whatever its task is when tuning.

    Each position is scored against the tokens of all transcripts. Those of a stream are not known beforehand: it begins
    with those of the first rows, and each batch adds its own. A checkpoint keeps which there are, and in which order.
    """

    parts = ("projector", "audio_encoder")
    takes_text = False

    def __init__(self, model: Any, processor: Any, data: SpeechData, stage: StageConfig, seed: int) -> None:
        super().__init__(model, processor, data, stage, seed)
        known = self.examples.sources if data.stream is None else np.array(self.stream_sources)
        vocabulary = unique_tokens([data.vocabularies[source] for source in np.unique(known).tolist()])
        if not len(vocabulary):
            raise DataError(f"stage {stage.name}: the first rows of its streams have no transcript to align to")
        self._table = model.get_input_embeddings().weight
        projector = model.multi_modal_projector
        shared = projector if isinstance(projector, CtcProjector) else None
        self.alignment = CtcAlignment(
            self._table,
            torch.from_numpy(vocabulary) if shared is None else shared.token_ids,
            stage.align.match_weight,
            embedding_scale=model.embedding_scale(),
            head=None if shared is None else (shared.blank, shared.log_scale),
        ).to(model.device)
        self.extra = self.alignment if shared is None else None

    def _select(self, examples: ExampleTable) -> tuple[ExampleTable, np.ndarray, np.ndarray]:
        """CTC needs a position for each token, and a blank between equal neighbours; versions without are left out.

        So are rows of several recordings, of more than a window, and of none.
        """
        lengths = examples.lengths
        needed = lengths.ctc_tokens[:, None]
        fits = (needed > 0) & (needed <= self.maker.fewest_tokens(lengths)) & lengths.one_window
        too_short = (lengths.exists & ~fits).sum(axis=1)
        for row in (
            np.flatnonzero(too_short).tolist() if self.data.stream is None else ()
        ):  # a stream tells of whole rows
            self.left_out += [examples[row].id] * int(too_short[row])
        chosen = fits.any(axis=1)
        if not chosen.any() and self.data.stream is None:
            raise DataError(
                f"stage {self.stage.name}: no transcript fits into its clip's positions: lower model.stack_factor"
            )
        audio = np.where(fits, self.maker.planned_tokens(lengths), 0)[chosen]
        return examples.subset(chosen), audio, np.zeros((len(audio), 1), dtype=np.int32)

    def _loss(self, batch: SpeechBatch) -> LossOutput:
        """Sum over clips of CTC and matching loss; the count is target tokens."""
        if self.data.stream is not None:
            self.alignment.extend(self._table, torch.from_numpy(unique_tokens(batch.transcripts)))
        embeddings, token_lengths = self.audio_embeddings(batch, augmented=True)
        targets = [self.alignment.targets(torch.from_numpy(transcript)) for transcript in batch.transcripts]
        target_lengths = torch.tensor([len(target) for target in targets])
        target_lengths = target_lengths.to(self.model.device)
        total, ctc, count = self.alignment.loss(embeddings.float(), token_lengths, torch.cat(targets), target_lengths)
        num_tokens = int(token_lengths.sum())
        output = LossOutput(total, float(count), batch.audio_seconds, num_tokens, {"ctc": ctc.item()})
        output.num_positions = embeddings.shape[0] * embeddings.shape[1]
        output.flops = self.audio_flops(batch) + 4.0 * num_tokens * embeddings.shape[2] * len(self.alignment.token_ids)
        return output

    def _project(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """What a CTC projector scores; of another one, what the language model will read."""
        projected: tuple[Tensor, Tensor] = self.model.project_for_ctc(frames, lengths)
        return projected

    def transcribe(self, examples: list[Example]) -> list[str]:
        """Greedy CTC decoding."""
        embeddings, token_lengths = self.audio_embeddings(self.first_versions(examples), augmented=False)
        decoded: list[list[int]] = self.alignment.decode(embeddings.float(), token_lengths)
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in decoded]

    def trainable_state(self) -> dict[str, Tensor]:
        """Of a stream, also the tokens that came so far."""
        state = super().trainable_state()
        return state if self.data.stream is None else state | {TOKEN_IDS: self.alignment.token_ids}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Undo `trainable_state`. CheckpointError when names or shapes differ."""
        if self.data.stream is not None and TOKEN_IDS in state:
            self.alignment.extend(self._table, state[TOKEN_IDS])
            if self.alignment.token_ids.tolist() != state[TOKEN_IDS].tolist():
                raise CheckpointError("the checkpoint's tokens do not begin with those of the stream's first rows")
        super().load_trainable_state({name: tensor for name, tensor in state.items() if name != TOKEN_IDS})
