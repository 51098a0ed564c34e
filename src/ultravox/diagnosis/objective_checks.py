"""Checks 16 to 18: what a stage asks for beside its loss: a teacher, augmentation, an alignment before it."""

import time
from typing import Any

import torch

from ultravox.config.schema import StageConfig
from ultravox.diagnosis.finding import Blame, Check, Finding, failed, passed, warned
from ultravox.diagnosis.practice import Practice
from ultravox.diagnosis.workbench import Workbench, fits_ctc, model_tolerance, needs_rows, needs_tuned_rows
from ultravox.model.adapters import lora_layers
from ultravox.training import features
from ultravox.training.align import AlignTask
from ultravox.training.examples import Example

ADAPTER_SPREAD = 0.05
"""Of the entries that adapters are given for a moment, in the weights' own standard deviations, times √rank."""
MOST_WIPED = 0.25
"""Of a clip's frames: time masks are to wipe a fifth of it at most, and short clips have few frames to count."""
DRAWS = 8
ALIGN_STEPS, ALIGN_CHUNK, ALIGN_SECONDS = 200, 20, 40.0
LEARNT_CTC = 0.1
"""Nats a token, at which greedy decoding has long been right."""


def check_teacher(bench: Workbench) -> Finding:
    """Check 16."""
    teacher = bench.teacher
    assert teacher is not None
    bench.reset()
    dialogues = [example.as_text[0] for example in bench.few]
    layers = lora_layers(bench.model.language_model).values()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # adapters of a fresh model add nothing, and would be missed by nobody
        for layer in layers:
            spread = ADAPTER_SPREAD * float(layer.weight.std()) * len(layer.lora_A) ** 0.5
            noise = torch.randn(layer.lora_B.shape, generator=generator) * spread
            layer.lora_B.copy_(noise.to(layer.lora_B))

    def said() -> torch.Tensor:
        fresh = type(teacher)(bench.model, teacher.kind, 0)  # keeps nothing
        return fresh.logits(fresh.hidden(dialogues)).float().log_softmax(-1)

    with_adapters = said()
    with torch.no_grad():
        for layer in layers:
            layer.lora_B.zero_()
    base = said()
    bench.reset()
    off = float((with_adapters.exp() * (with_adapters - base)).sum(-1).mean())
    evidence = (
        f"after {len(layers)} adapters were disturbed, what the teacher says moved by {off:.1e} nats a token "
        f"({len(base)} tokens)"
    )
    if with_adapters.requires_grad or base.requires_grad:
        return failed(
            "what the teacher says carries a gradient",
            "the student is taught by moving its teacher",
            "compute the teacher's logits under torch.no_grad()",
        )
    if not abs(off) < model_tolerance(bench.model, 1e-5, 1e-2):
        return failed(
            f"{evidence}, and ought not to have moved",
            "the teacher reads with the student's adapters, and so it teaches what the student says already",
            "leave the adapters out in the teacher's pass and in its output layer (without_adapters)",
            moved=off,
        )
    return passed(evidence, moved=off)


def _needs_teacher(bench: Workbench) -> str:
    unasked = needs_tuned_rows(bench)
    return unasked or ("" if bench.teacher is not None else "the stage distils nothing (tune.distillation.weight)")


def _trained_stage(bench: Workbench) -> StageConfig:
    """The stage with its augmentation, which the others do without."""
    return next(stage for stage in bench.config.stages if stage.name == bench.stage.name)


def check_augmentation(bench: Workbench) -> Finding:
    """Check 17."""
    options = _trained_stage(bench).augment
    encoder = bench.model.audio_tower
    batch = bench.task.first_versions(bench.several)
    with torch.no_grad():
        frames, lengths = bench.task.features.frames(batch.values, batch.lengths, encoded=batch.encoded)
    frames = frames.float()
    own = torch.arange(frames.shape[1]) < lengths[:, None]
    wiped, channels, moved = [], [], []
    for draw in range(DRAWS):
        changed = features.augment(
            frames.clone(), lengths, options, (bench.config.seed, "diagnosis", draw), encoder.frames_per_second
        )
        silent = (changed == 0).all(-1) & own
        wiped.append(silent.sum(1) / lengths)
        channels.append(((changed == 0) & own[..., None] & ~silent[..., None]).sum() / (own & ~silent).sum())
        kept = own[..., None] & (changed != 0)
        moved.append((changed - frames)[kept].square().mean().sqrt() / frames[kept].square().mean().sqrt())
    most, mean = float(torch.cat(wiped).max()), float(torch.cat(wiped).mean())
    lost = float(torch.stack(channels).mean()) / frames.shape[-1]
    noise = float(torch.stack(moved).mean())
    evidence = (
        f"of {len(lengths)} clips in {DRAWS} draws, augmentation wipes {mean:.0%} of the frames ({most:.0%} of a clip "
        f"at most), {lost:.0%} of the channels of those that are left, and moves what remains by {noise:.2f} of its RMS"
    )
    most_lost = min(1.0, options.channel_masks * options.max_channel_mask_share)
    numbers: dict[str, Any] = {"most_wiped": most, "mean_wiped": mean, "channels_lost": lost, "moved": noise}
    if most > MOST_WIPED or lost > most_lost + 0.01 or noise > 2 * options.noise_std + 1e-3:
        return failed(
            f"{evidence}: more than {MOST_WIPED:.0%} of a clip, {most_lost:.0%} of the channels, or a noise of "
            f"{options.noise_std:g}",
            "masks that keep what they should hide, or are counted in other units than frames; noise of another scale",
            "look at stages.<name>.augment, and at audio/augment.py",
            **numbers,
        )
    return passed(evidence, **numbers)


def _needs_augmentation(bench: Workbench) -> str:
    options = _trained_stage(bench).augment
    if not (options.time_masks or options.channel_masks or options.noise_std):
        return "the stage does not augment frames"
    return needs_rows(bench)


def _alignment(bench: Workbench) -> tuple[AlignTask | None, list[Example]]:
    """The run's alignment, and those of the few rows that it can use."""
    task = bench.task if isinstance(bench.task, AlignTask) else bench.align
    if task is None:
        return None, []
    sources = set(task.examples.sources.tolist()) if bench.data.stream is None else None
    return task, [row for row in bench.few if (sources is None or row.source in sources) and fits_ctc(bench, row)]


def check_alignment(bench: Workbench) -> Finding:
    """Check 18."""
    task, rows = _alignment(bench)
    assert task is not None
    bench.reset()
    practice = Practice.of(task, [task.first_versions(rows)])
    meant = [task.tokenizer.decode(row.transcript, skip_special_tokens=True) for row in rows]
    until = time.monotonic() + ALIGN_SECONDS
    said: list[str] = []
    while said != meant and practice.state.step < ALIGN_STEPS and time.monotonic() < until:
        practice.train(ALIGN_CHUNK)
        bench.model.eval()
        with torch.no_grad():
            said = task.transcribe(rows)
        task.train_mode()
    loss = practice.records[-1].metrics.get("ctc", practice.records[-1].loss)
    exact = sum(one == other for one, other in zip(said, meant, strict=True))
    bench.reset()
    evidence = (
        f"after {practice.state.step} steps of alignment on {len(rows)} rows the CTC loss is {loss:.3f} nats a token, "
        f"and {exact} of them are decoded exactly"
    )
    if exact == len(rows):
        return passed(evidence, steps=practice.state.step, loss=loss)
    lines = [f"expected {one!r}, decoded {other!r}" for one, other in zip(meant, said, strict=True) if one != other]
    if loss < LEARNT_CTC:
        return failed(
            f"{evidence}: the loss is learnt, the decoding is not",
            "targets and rows of the embedding table do not belong together (the blank is row 0, tokens follow)",
            "hold the alignment's targets against the tokens of one transcript",
            lines,
            loss=loss,
        )
    return warned(
        evidence,
        "rates that are too low, a machine that is too slow for this check, or too few positions for the words",
        "raise the stage's rate of the projector, or lower model.stack_factor",
        lines,
        loss=loss,
    )


def _needs_alignment(bench: Workbench) -> str:
    if error := needs_rows(bench):
        return error
    task, rows = _alignment(bench)
    if task is None:
        return "the run does not align"
    return "" if rows else "none of the few rows has room for its transcript"


CHECKS = [
    Check(
        16,
        "teacher without adapters",
        "what the teacher says does not move with the student's adapters, and carries no gradient",
        Blame.MODEL,
        check_teacher,
        _needs_teacher,
    ),
    Check(
        17,
        "augmentation",
        "at most a quarter of a clip is wiped out, and no more channels and noise than the configuration says",
        Blame.DATA,
        check_augmentation,
        _needs_augmentation,
    ),
    Check(
        18,
        "align one batch",
        "after aligning a few rows, greedy CTC decoding gives their transcripts, within 200 steps",
        Blame.MODEL,
        check_alignment,
        _needs_alignment,
    ),
]
