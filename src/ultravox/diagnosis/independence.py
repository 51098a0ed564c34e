"""Check 10: whether an example's result depends on the others of its batch, or on padding."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ultravox.audio.waveform import change_speed
from ultravox.data.collate import pad_frames
from ultravox.diagnosis.finding import Blame, Check, Finding, failed, passed
from ultravox.diagnosis.workbench import Workbench, model_tolerance, needs_rows
from ultravox.errors import AudioError
from ultravox.model.ctc_projector import CtcProjector
from ultravox.training.align import AlignTask
from ultravox.training.batches import SpeechBatch
from ultravox.training.rows import load_within

SAME = (1e-3, 5e-2)
"""Share by which a value in a batch may differ from the same alone, in float32 and in 16 bits."""


def check_independence(bench: Workbench) -> Finding:
    """Losses and input gradients of rows in a batch against those of each alone, and encoder frames likewise."""
    bench.begin()
    rows = bench.several
    tolerance = model_tolerance(bench.model, *SAME)
    loss, gradients = _audio_gradients(bench, bench.task.first_versions(rows))
    total, worst, where = 0.0, 0.0, ""
    for index, row in enumerate(rows):
        alone_loss, (alone, *_) = _audio_gradients(bench, bench.task.first_versions([row]))
        total += alone_loss
        together = gradients[index]
        size = float(alone.norm())
        unlike = float((together[: len(alone)] - alone).norm()) / size if size else float(together.norm() > 0)
        unlike = max(unlike, float(together[len(alone) :].norm()) / size if size else 0.0)  # of the padding
        if unlike > worst:
            worst, where = unlike, row.id
    loss_unlike = abs(loss - total) / max(abs(total), 1e-12)
    heard, frames_unlike, projected_unlike = _audio_difference(bench)
    bench.reset()
    numbers: dict[str, Any] = {
        "loss_difference": loss_unlike,
        "gradient_difference": worst,
        "frame_difference": frames_unlike,
        "projected_difference": projected_unlike,
        "tolerance": tolerance,
        "rows": len(rows),
    }
    evidence = (
        f"{len(rows)} rows in one batch against each alone: losses differ by {loss_unlike:.1e}, gradients of their "
        f"audio by {worst:.1e} ({where or 'none of them'})"
    )
    if heard:
        evidence += f", encoder frames of {heard} recordings by {frames_unlike:.1e}, the projector's output of them by "
        evidence += f"{projected_unlike:.1e}"
    evidence += f" (limit {tolerance:g})"
    if not frames_unlike <= tolerance:
        return failed(
            evidence,
            "the audio encoder attends to the padding of shorter recordings",
            "mask the padding in the encoder's attention and before its convolutions",
            **numbers,
        )
    if not projected_unlike <= tolerance:
        return failed(
            evidence,
            "the projector, or how frames are put together for it, mixes a recording with its padding: frames reshaped "
            "along the wrong axis, a norm over time, or a convolution or attention without a mask",
            "look at downsample.py and the projector: a clip's positions must not depend on how far it is padded",
            **numbers,
        )
    if not (loss_unlike <= tolerance and worst <= tolerance):
        return failed(
            evidence,
            "rows see each other or their padding: a missing attention mask, packed rows without borders, audio put "
            "into another row's places, or a norm over the batch",
            "try packing: off; then look at masks, positions and where the audio is put in",
            **numbers,
        )
    return passed(evidence, **numbers)


def _audio_gradients(bench: Workbench, batch: SpeechBatch) -> tuple[float, list[Tensor]]:
    """Sum of the losses, and its gradient towards each window's projected audio, [window][token, hidden]."""
    bench.task.train_mode()
    projector = bench.model.multi_modal_projector
    if isinstance(projector, CtcProjector) and isinstance(bench.task, AlignTask):
        projector = projector.base  # what is scored is what is trained
    with _watching(projector) as projected:
        output = bench.task.loss(batch)
        output.sum.backward()
    (embeddings,) = projected
    found = torch.zeros_like(embeddings) if embeddings.grad is None else embeddings.grad
    for parameter in bench.task.trainable.values():
        parameter.grad = None
    return float(output.sum.detach()), [row.double() for row in found]


@contextmanager
def _watching(projector: Any) -> Iterator[list[Tensor]]:
    """Keeps what the projector gives, with the gradient that comes back to it."""
    kept: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        embeddings, lengths = output
        if not embeddings.requires_grad:
            embeddings = embeddings.detach().requires_grad_()
        embeddings.retain_grad()
        kept.append(embeddings)
        return embeddings, lengths

    handle = projector.register_forward_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()


@torch.no_grad()
def _audio_difference(bench: Workbench) -> tuple[int, float, float]:
    """How many recordings of different lengths were heard together, and how far that is from each alone.

    First the encoder's frames, then what the projector makes of the frames as they are in the batch.
    """
    features, limits = bench.task.features, (bench.data.min_audio_seconds, bench.data.max_audio_seconds)
    by_length = sorted(bench.several, key=lambda row: row.versions[0].seconds)
    pieces = []
    for row in dict.fromkeys([0, len(by_length) // 2, len(by_length) - 1]):
        example = by_length[row]
        try:
            waveform = change_speed(load_within(example.recordings[0], *limits), example.versions[0].speed)
        except AudioError:
            continue
        pieces.append(features.heard(waveform)[0])
    if len({len(piece) for piece in pieces}) < 2:
        return 0, 0.0, 0.0
    bench.model.eval()
    together, lengths = _encode(bench.model, pieces)
    projected, positions = bench.model.project(together, lengths)
    worst = worst_projected = 0.0
    for index, piece in enumerate(pieces):
        alone, count = _encode(bench.model, [piece])
        worst = max(worst, _unlike(together[index, : int(lengths[index])], alone[0, : int(count[0])]))
        alone, count = bench.model.project(
            together[index : index + 1, : int(lengths[index])], lengths[index : index + 1]
        )
        worst_projected = max(
            worst_projected, _unlike(projected[index, : int(positions[index])], alone[0, : int(count[0])])
        )
    return len(pieces), worst, worst_projected


def _unlike(found: Tensor, expected: Tensor) -> float:
    """Their difference as a share of what was expected."""
    if found.shape != expected.shape:
        return float("inf")
    return float((found.double() - expected.double()).norm()) / (float(expected.double().norm()) or 1.0)


def _encode(model: Any, pieces: list[Any]) -> tuple[Tensor, Tensor]:
    values, lengths = pad_frames(pieces)
    return model.encode_audio(values.transpose(1, 2), lengths)


CHECKS = [
    Check(
        10,
        "independence",
        "a row's loss and input gradients are the same alone and in a batch: nothing comes from others or padding",
        Blame.MIXING,
        check_independence,
        needs_rows,
    )
]
