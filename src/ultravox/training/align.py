"""Task `align`: CTC through the language model's own embedding rows. The language model itself does not run."""

from typing import Any

import numpy as np
import torch

from ultravox.config.schema import StageConfig
from ultravox.errors import DataError
from ultravox.objectives.alignment import CtcAlignment
from ultravox.training.batches import SpeechBatch
from ultravox.training.examples import Example, ExampleTable
from ultravox.training.speech import SpeechData
from ultravox.training.speech_task import SpeechTask
from ultravox.training.task import LossOutput


class AlignTask(SpeechTask):
    """Every clip's transcript, whatever its task is when tuning."""

    parts = ("projector", "audio_encoder")

    def __init__(self, model: Any, processor: Any, data: SpeechData, stage: StageConfig, seed: int) -> None:
        super().__init__(model, processor, data, stage, seed)
        found = [data.vocabularies[source] for source in np.unique(self.examples.sources).tolist()]
        vocabulary = np.unique(np.concatenate(found))
        table = model.get_input_embeddings().weight
        self.alignment = CtcAlignment(table, torch.from_numpy(vocabulary), stage.align.match_weight)
        self.extra = self.alignment

    def _select(self, examples: ExampleTable) -> tuple[ExampleTable, np.ndarray, np.ndarray]:
        """CTC needs a position for each token, and a blank between equal neighbours; versions without are left out.

        So are rows of several recordings, of more than a window, and of none.
        """
        lengths = examples.lengths
        needed = lengths.ctc_tokens[:, None]
        fits = (needed > 0) & (needed <= self.maker.fewest_tokens(lengths)) & lengths.one_window
        too_short = (lengths.exists & ~fits).sum(axis=1)
        for row in np.flatnonzero(too_short).tolist():
            self.left_out += [examples[row].id] * int(too_short[row])
        chosen = fits.any(axis=1)
        if not chosen.any():
            raise DataError(
                f"stage {self.stage.name}: no transcript fits into its clip's positions: lower model.stack_factor"
            )
        audio = np.where(fits, self.maker.planned_tokens(lengths), 0)[chosen]
        return examples.subset(chosen), audio, np.zeros((len(audio), 1), dtype=np.int32)

    def _loss(self, batch: SpeechBatch) -> LossOutput:
        """Sum over clips of CTC and matching loss; the count is target tokens."""
        embeddings, token_lengths = self.audio_embeddings(batch, augmented=True)
        targets = [self.alignment.targets(torch.from_numpy(transcript)) for transcript in batch.transcripts]
        target_lengths = torch.tensor([len(target) for target in targets])
        total, ctc, count = self.alignment.loss(embeddings.float(), token_lengths, torch.cat(targets), target_lengths)
        num_tokens = int(token_lengths.sum())
        return LossOutput(total, float(count), batch.audio_seconds, num_tokens, {"ctc": ctc.item()})

    def transcribe(self, examples: list[Example]) -> list[str]:
        """Greedy CTC decoding."""
        embeddings, token_lengths = self.audio_embeddings(self.first_versions(examples), augmented=False)
        decoded: list[list[int]] = self.alignment.decode(embeddings.float(), token_lengths)
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in decoded]
