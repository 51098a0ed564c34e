"""Checks 3, 4 and 5: how the model stands before its first step, and whether its labels are where they belong."""

import math
from typing import Any

import numpy as np
import torch

from ultravox.data.collate import TokenBatch, loss_mask
from ultravox.diagnosis.finding import Blame, Check, Finding, failed, passed, warned
from ultravox.diagnosis.plain_forward import Row, ShiftScan, heard_batch, mean_loss, plain_row, row_embeddings, scan
from ultravox.diagnosis.workbench import (
    Workbench,
    describe_error,
    model_tolerance,
    needs_rows,
    needs_tuned_rows,
    needs_tuning,
)
from ultravox.errors import DataError
from ultravox.metrics.token_predictions import ALARM_POSITIONS, ALARM_RATIO
from ultravox.model.audio_encoder import length_mask
from ultravox.model.ctc_projector import CtcProjector
from ultravox.tokens import IGNORE_INDEX

MOST_OVER_TEXT = 0.5
"""Nats a token that the first loss with audio may lie above that without."""
USUAL_RATIO, POSSIBLE_RATIO = (0.3, 3.0), (0.1, 10.0)
LEAKED_NATS = 0.1
"""Nats a token by which training does better than it could."""
SAME_LOSS = (1e-3, 3e-2)
"""Share by which two ways to compute one loss may differ, in float32 and with weights of 16 bits."""


def plain_rows(bench: Workbench, *, audio: bool) -> list[Row]:
    """The several rows, each by itself, with its audio or without any."""
    task = bench.tune
    batch = task.first_versions(bench.several)
    embeddings = row_embeddings(task, batch) if audio else [None] * len(batch.ids)
    kind = task.stage.tune.loss_mask
    return [
        plain_row(task, ids, loss_mask(ids, supervised, task.audio_token_id, kind), embedded, name)
        for name, ids, supervised, embedded in zip(
            batch.ids, batch.input_ids, batch.supervised, embeddings, strict=True
        )
    ]


def check_first_loss(bench: Workbench) -> Finding:
    """Check 3."""
    error = bench.forward_error
    if error is not None:
        return failed(
            f"there is no loss: {describe_error(error)}",
            "counts that do not fit (check 2)" if isinstance(error, DataError) else "an error on the way to the loss",
            "mend what check 2 names, or run the first step under a debugger",
        )
    bench.reset()
    bench.model.eval()
    loss, alone = (mean_loss(bench.model, plain_rows(bench, audio=audio)) for audio in (True, False))
    top = math.log(bench.model.get_output_embeddings().weight.shape[0])
    numbers: dict[str, Any] = {"loss": loss, "loss_without_audio": alone, "log_vocabulary": top}
    evidence = (
        f"first loss {loss:.2f} nats a token with audio, {alone:.2f} without any, ln V = {top:.2f}, over "
        f"{len(bench.several)} rows"
    )
    # until it is aligned, a projector that speaks in the language model's own rows says words that nobody said
    speaks = bench.checkpoint is None and isinstance(bench.model.multi_modal_projector, CtcProjector)
    is_taught = alone <= top - MOST_OVER_TEXT  # a language model that knows nothing is at ln V already
    if not math.isfinite(loss) or not math.isfinite(alone):
        return failed(
            evidence,
            "a value that is not finite in the language model or in the audio",
            "look for NaN in the weights, and in the features of these rows; with 16 bits, try float32",
            **numbers,
        )
    if (loss > alone + MOST_OVER_TEXT and not speaks) or (is_taught and loss > top):
        return failed(
            evidence,
            "audio embeddings that the language model has never seen the like of, usually by their scale (check 4); "
            "or a chat template that is not the model's",
            "look at check 4; compare model.chat_template with the language model's own",
            **numbers,
        )
    return passed(evidence, **numbers)


def check_scale(bench: Workbench) -> Finding:
    """Check 4."""
    task = bench.task
    bench.reset()
    batch = task.first_versions(bench.several)
    with torch.no_grad():
        projected, lengths = task.audio_embeddings(batch, augmented=False)
    real = projected[length_mask(lengths, projected.shape[1])].float()
    audio = float(real.square().mean().sqrt())
    text = bench.model.embedding_rms()
    ratio = audio / text if text else math.inf
    numbers: dict[str, Any] = {"audio_rms": audio, "text_rms": text, "ratio": ratio}
    evidence = f"RMS of audio embeddings {audio:.3g}, of text embeddings {text:.3g}: ratio {ratio:.3g}"
    cause = "the projector's last layer begins at another scale than the language model's embedding table"
    action = "scale the projector's last layer (SwigluProjector.init_scale) to the embedding table's RMS"
    if not POSSIBLE_RATIO[0] <= ratio <= POSSIBLE_RATIO[1]:
        return failed(evidence, cause, action, **numbers)
    if not USUAL_RATIO[0] <= ratio <= USUAL_RATIO[1]:
        return warned(evidence, cause, action, **numbers)
    return passed(evidence, **numbers)


def check_shift(bench: Workbench) -> Finding:
    """Check 5: the loss that is trained on is the one of the labels at shift 0, and so are the best tokens."""
    task = bench.tune
    bench.reset()
    batch = task.first_versions(bench.several)
    output = task.loss(batch)
    trained = float(output.sum.detach()) / max(1.0, output.count)
    bench.model.eval()
    rows = plain_rows(bench, audio=True)
    _supervise_as_trained(rows, task.tokens(heard_batch(task, batch)))
    found = scan(bench.model, rows)
    right = found.losses[0]
    fits = min(found.losses, key=lambda shift: (abs(found.losses[shift] - trained), abs(shift)))
    tolerance = model_tolerance(bench.model, *SAME_LOSS) * max(1.0, abs(right))
    best = found.predictions.best_shift
    numbers: dict[str, Any] = {
        "trained_loss": trained,
        "losses": {str(shift): loss for shift, loss in found.losses.items()},
        "fits_shift": fits,
        "best_shift": best,
        "accuracy": found.predictions.accuracy(),
        "best_shift_accuracy": found.predictions.accuracy(best),
        "floor": found.predictions.accuracy_floor,
    }
    lines = [f"labels {shift:+d}: {loss:8.4f} nats a token" for shift, loss in found.losses.items()]
    if not abs(right - trained) <= tolerance:
        if fits != 0 and abs(found.losses[fits] - trained) <= 10 * tolerance:
            action = "shift the labels exactly once, where the loss is computed"
            said = f"it is that of the labels {abs(fits)} {'later' if fits > 0 else 'earlier'} (s = {fits:+d})"
            cause = f"the labels are shifted {abs(fits)} too {'far' if fits > 0 else 'little'}"
            if fits > 0:
                cause += ": usually both the data and the loss shift them"
        else:
            said = f"it is that of no shift from {min(found.losses)} to {max(found.losses)}"
            action = "hold the batch's attention mask, positions and loss against one row by itself (see check 10)"
            if trained < right - LEAKED_NATS:
                cause = "training sees what it should tell: a causal mask that lets a token see the next one, or "
                cause += "labels among the inputs; generation will not see it"
            else:
                cause = "positions or masks of the batch that are not those of the row by itself, or a loss that is "
                cause += "not next-token cross-entropy on the supervised tokens"
        return failed(
            f"training's loss is {trained:.4f} nats a token, the labels' own {right:.4f}: {said}",
            cause,
            action,
            lines,
            **numbers,
        )
    return _judge_predictions(bench, found, trained, lines, numbers)


def _supervise_as_trained(rows: list[Row], tokens: TokenBatch) -> None:
    """Which tokens are supervised is for check 1: here they are those of training, if the labels are in place."""
    for row, ids, labels in zip(rows, tokens.input_ids.numpy(), tokens.labels.numpy(), strict=True):
        ids, labels = ids[: len(row.ids)], labels[: len(row.ids)]
        chosen = labels != IGNORE_INDEX
        if len(ids) == len(row.ids) and np.array_equal(ids[chosen], labels[chosen]) and chosen.any():
            row.supervised = chosen


def _judge_predictions(bench: Workbench, found: ShiftScan, trained: float, lines: list[str], numbers: dict) -> Finding:
    """A trained model's best tokens must fit the labels where they are; a fresh one's are told."""
    counts, best = found.predictions, found.predictions.best_shift
    reached, floor = counts.accuracy(best), counts.accuracy_floor
    evidence = (
        f"training's loss {trained:.4f} is that of the labels at shift 0; of {counts.num_positions} best tokens "
        f"{counts.accuracy():.1%} fit, by chance {floor:.1%}"
    )
    if best != 0:
        evidence += f"; {reached:.1%} fit at shift {best:+d}"
    is_alarm = best != 0 and counts.num_positions >= ALARM_POSITIONS and reached > ALARM_RATIO * floor
    if is_alarm and bench.checkpoint is not None:
        return failed(
            evidence,
            f"these weights were trained with labels that are off by {abs(best)}",
            "train again: the labels of this code are in place",
            lines,
            **numbers,
        )
    if is_alarm:
        evidence += " (weights that have learnt nothing yet may copy their input)"
    return passed(evidence, lines, **numbers)


CHECKS = [
    Check(
        3,
        "first loss",
        "≤ ln V with a taught language model, and at most 0.5 nat above the same without audio",
        Blame.SCALE,
        check_first_loss,
        lambda bench: needs_tuning(bench) or ("" if bench.several else "it found no row of one short recording"),
    ),
    Check(
        4,
        "scale of audio embeddings",
        "RMS of audio / RMS of text: WARN outside 0.3–3, FAIL outside 0.1–10",
        Blame.SCALE,
        check_scale,
        lambda bench: needs_rows(bench, 1),
    ),
    Check(5, "shift scan", "s* = 0", Blame.DATA, check_shift, needs_tuned_rows),
]
