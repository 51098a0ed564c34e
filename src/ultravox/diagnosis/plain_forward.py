"""The language model on one row at a time, without packing and padding: what a batch is held against."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ultravox.data.collate import expand_audio
from ultravox.metrics.token_predictions import MAX_SHIFT, PredictionCounts, count_predictions
from ultravox.training.batches import SpeechBatch
from ultravox.training.tune import TuneTask

SHIFTS = range(-MAX_SHIFT, MAX_SHIFT + 1)


@dataclass(slots=True)
class Row:
    """One conversation with its recordings' embeddings in place, or without any."""

    ids: np.ndarray
    """Each placeholder as often as its recording has positions, [token]."""
    supervised: np.ndarray
    """bool [token]"""
    embeddings: Tensor | None
    """Of all recordings, [audio_token, hidden]."""


@torch.no_grad()
def row_embeddings(task: TuneTask, batch: SpeechBatch) -> list[Tensor]:
    """Of each row of a batch: the projector's output for all its windows, [audio_token, hidden]."""
    if not len(batch.lengths):
        return [torch.zeros(0) for _ in batch.ids]
    projected, lengths = task.audio_embeddings(batch, augmented=False)
    windows = [row[:length] for row, length in zip(projected, lengths.tolist(), strict=True)]
    found, start = [], 0
    for count in batch.num_windows:
        found.append(
            torch.cat(windows[start : start + count]) if count else projected.new_zeros(0, projected.shape[-1])
        )
        start += count
    return found


@torch.no_grad()
def heard_batch(task: TuneTask, batch: SpeechBatch) -> SpeechBatch:
    """The batch as the step counts its positions, once the projector has decided how many there are."""
    if not task.model.multi_modal_projector.compresses or not len(batch.lengths):
        return batch
    return task.counted(batch, task.audio_embeddings(batch, augmented=False)[1])


def plain_row(
    task: TuneTask, ids: np.ndarray, supervised: np.ndarray, embeddings: Tensor | None, name: str = "the row"
) -> Row:
    """A conversation with ONE placeholder, or without any where there are no embeddings."""
    if embeddings is None:
        kept = ids != task.audio_token_id
        return Row(ids[kept], supervised[kept], None)
    return Row(*expand_audio(name, ids, supervised, task.audio_token_id, [len(embeddings)]), embeddings)


@torch.no_grad()
def row_logits(model: Any, row: Row) -> Tensor:
    """Next-token logits, float32 [token, vocabulary]."""
    ids = torch.from_numpy(row.ids)[None].to(model.device)
    if row.embeddings is None:
        embedded = model.embed(ids)
    else:
        embedded = model.embed(ids, row.embeddings[None], torch.tensor([len(row.embeddings)], device=model.device))
    return model.language_model(inputs_embeds=embedded, use_cache=False).logits[0].float()


@dataclass(slots=True)
class ShiftScan:
    """Loss and best tokens of some rows, with the labels at several shifts."""

    losses: dict[int, float]
    """Shift s → mean of -log p over the supervised tokens, each told s places earlier than it should be; 0 is right."""
    predictions: PredictionCounts


def scan(model: Any, rows: Sequence[Row]) -> ShiftScan:
    """Teacher-forced losses of rows at shifts from -4 to 4. The token at t belongs to the logits at t - 1 - shift."""
    sums, counts = dict.fromkeys(SHIFTS, 0.0), dict.fromkeys(SHIFTS, 0)
    predictions = PredictionCounts()
    for row in rows:
        logits = row_logits(model, row)
        places = np.flatnonzero(row.supervised)
        for shift in SHIFTS:
            from_place = places - 1 - shift
            kept = (from_place >= 0) & (from_place < len(row.ids))
            targets = torch.from_numpy(row.ids[places[kept]])
            sums[shift] += float(F.cross_entropy(logits[from_place[kept]], targets, reduction="sum"))
            counts[shift] += int(kept.sum())
        places = places[places > 0]
        best = logits[places - 1].argmax(-1).numpy()
        predictions += count_predictions(best, row.ids[places], places)
    return ShiftScan({shift: sums[shift] / counts[shift] for shift in SHIFTS if counts[shift]}, predictions)


def mean_loss(model: Any, rows: Sequence[Row]) -> float:
    """Mean of -log p over all supervised tokens."""
    sums, counts = row_losses(model, rows)
    return sum(sums) / max(1, sum(counts))


def row_losses(model: Any, rows: Sequence[Row]) -> tuple[list[float], list[int]]:
    """Sum of -log p of each row, and how many tokens it is a sum over."""
    sums, counts = [], []
    for row in rows:
        places = np.flatnonzero(row.supervised)
        places = places[places > 0]
        logits = row_logits(model, row)[places - 1]
        sums.append(float(F.cross_entropy(logits, torch.from_numpy(row.ids[places]), reduction="sum")))
        counts.append(len(places))
    return sums, counts
