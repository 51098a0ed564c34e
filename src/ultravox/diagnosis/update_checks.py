"""Checks 6, 7, 13 and 14: what a few steps of the real optimizer change, by how much, and at which rate it breaks."""

import hashlib
import math
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ultravox.diagnosis.finding import Blame, Check, Finding, failed, passed, skipped, warned
from ultravox.diagnosis.practice import Practice, warmup_steps
from ultravox.diagnosis.workbench import Workbench, needs_rows
from ultravox.model.adapters import lora_layers
from ultravox.training.speech_task import PARTS

STEPS = 5
USUAL_UPDATE = (1e-4, 1e-2)
IMPOSSIBLE_UPDATE = 1.0
"""A step that is as large as the weights leaves nothing of them."""
MEASURED_STEPS = 3
RANGE_STEPS, RANGE_FIRST, RANGE_GROWTH = 20, 0.01, 1.6
"""Up to 0.01 × 1.6^19 = 76 times the configured rates."""
RANGE_SECONDS = 60.0
"""On a slow machine the range ends where it is then."""
DIVERGED = 1.0
"""Nats a token above the first loss."""
NEAR_DIVERGENCE = 2.0
SAME_GRADIENT = 1e-5
NAMED = 4


def check_trains(bench: Workbench) -> Finding:
    """Check 6."""
    task = bench.task
    bench.reset()
    wanted = _parts_asked_for(bench)
    groups = {group.part: group for group in task.parameter_groups()}
    if missing := [part for part in wanted if part not in groups]:
        return failed(
            f"{', '.join(missing)} should train, as the configuration says, and "
            f"{'does' if len(missing) == 1 else 'do'} not; what trains: {', '.join(groups) or 'nothing'}",
            "requires_grad is off where it should be on",
            "look at what freezes the model before its stage (model.factory.build_model)",
            missing=missing,
        )
    trained = {name: p for group in groups.values() for name, p in group.parameters.items()}
    frozen = {name: t for name, t in bench.model.state_dict(keep_vars=True).items() if name not in trained}
    before, weights = checksums(frozen), {name: p.detach().clone() for name, p in trained.items()}
    practice = Practice.of(task, [task.first_versions(bench.several)])
    largest: dict[str, float] = defaultdict(float)
    endless: set[str] = set()
    for _ in range(STEPS):
        practice.train(1)
        for name, parameter in trained.items():
            norm = 0.0 if parameter.grad is None else float(parameter.grad.norm())
            largest[name] = max(largest[name], norm if math.isfinite(norm) else 0.0)
            if not math.isfinite(norm):
                endless.add(name)
    changed = [name for name, digest in checksums(frozen).items() if digest != before[name]]
    still = [name for name, value in weights.items() if torch.equal(value, trained[name].detach())]
    unmoved = [name for name in trained if largest[name] == 0 and name not in endless]
    skips = practice.state.skipped
    bench.reset()
    by_part = {part: list(group.parameters) for part, group in groups.items()}
    return _judge_training(by_part, changed, still, unmoved, sorted(endless), skips, len(frozen))


def _judge_training(
    by_part: Mapping[str, list[str]],
    changed: list[str],
    still: list[str],
    unmoved: list[str],
    endless: list[str],
    skips: int,
    num_frozen: int,
) -> Finding:
    num_trained = sum(map(len, by_part.values()))
    numbers: dict[str, Any] = {
        "trained": num_trained,
        "frozen": num_frozen,
        "frozen_changed": changed,
        "trained_unchanged": still,
        "without_gradient": unmoved,
        "gradient_not_finite": endless,
        "steps_skipped": skips,
    }
    if endless or skips:
        where = f": {_few(endless)}" if endless else ""
        return failed(
            f"gradients or losses that are not finite in {STEPS} steps{where}; {skips} steps were left out",
            "a division by 0, a logarithm of 0, or numbers too large for the type of the weights",
            "run one step with torch.autograd.set_detect_anomaly(True); with 16 bits, try float32",
            **numbers,
        )
    for names, said, cause, action in (
        (
            unmoved,
            "no gradient reaches",
            "the graph is cut on the way (detach, no_grad, a copy by numbers), or the part has no say in the loss",
            "look for detach and torch.no_grad between the projector and the loss",
        ),
        (
            still,
            f"{STEPS} steps did not change",
            "a learning rate of 0, an optimizer that holds other tensors than the model, or a step that is not taken",
            "look at lr in the log, and at which tensors the optimizer got",
        ),
    ):
        whole = [part for part, mine in by_part.items() if sum(name in names for name in mine) > len(mine) / 2]
        if whole:
            of = {part: sum(name in names for name in by_part[part]) for part in whole}
            told = ", ".join(f"{part} ({count} of {len(by_part[part])} tensors)" for part, count in of.items())
            return failed(f"{said} {told}", cause, action, **numbers)
    if changed:
        return failed(
            f"{len(changed)} frozen tensors changed in {STEPS} steps: {_few(changed)}",
            "an optimizer that holds more than what trains, or a layer that writes into its own weights or buffers",
            "give the optimizer task.parameter_groups() alone",
            **numbers,
        )
    parts = ", ".join(f"{part} {len(names)}" for part, names in by_part.items())
    evidence = f"all {num_frozen} frozen tensors are what they were after {STEPS} steps; trained tensors: {parts}"
    if odd := sorted({*unmoved, *still}):
        return warned(
            f"{evidence}; {len(odd)} of them did not move: {_few(odd)}",
            "tensors that this objective does not use, such as the embedding of masked frames",
            "look whether these should train",
            **numbers,
        )
    return passed(f"{evidence}; all of them changed, by finite gradients", **numbers)


def _parts_asked_for(bench: Workbench) -> list[str]:
    """What the configuration wants trained in the stage."""
    model, lr = bench.config.model, bench.stage.optim.lr
    trains = {
        "projector": True,
        "language_model": model.language_model_lora.rank > 0,
        "audio_encoder": model.train_audio_encoder or model.audio_encoder_lora.rank > 0,
    }
    return [part for part in bench.task.parts if trains[part] and getattr(lr, part) > 0]


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """Of the bytes of each tensor."""
    return {name: hashlib.blake2b(_bytes(tensor), digest_size=16).digest() for name, tensor in tensors.items()}


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data


def _few(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def check_update_ratio(bench: Workbench) -> Finding:
    """Check 7: of each module after the warm-up; of an adapter, of the weight that it changes."""
    task = bench.task
    practice = Practice.of(task, [bench.begin()])
    if steps := warmup_steps(bench.stage):
        practice.train(steps)
    ratios: dict[str, list[float]] = defaultdict(list)
    for _ in range(MEASURED_STEPS):
        before = _module_weights(bench)
        practice.train(1)
        for name, weight in _module_weights(bench).items():
            size = float(before[name].norm())
            ratios[name].append(float((weight - before[name]).norm()) / size if size else 0.0)
    practice.stand_still()
    practice.train(1)
    peaks = {group.part: group.lr for group in practice.optimizer.groups}
    wrong = {part: rate for part, rate in practice.optimizer.rates.items() if not math.isclose(rate, peaks[part])}
    bench.reset()
    found = {name: float(np.median(values)) for name, values in ratios.items()}
    if not found:
        return failed("nothing trains", "see check 6", "mend what check 6 names")
    least, most = (choose(found, key=lambda name: found[name]) for choose in (min, max))
    median = {
        part: float(np.median([ratio for name, ratio in found.items() if name.startswith(prefix)]))
        for part, prefix in PARTS.items()
        if any(name.startswith(prefix) for name in found)
    }
    numbers: dict[str, Any] = {
        "modules": len(found),
        "median": median,
        "least": [least, found[least]],
        "most": [most, found[most]],
    }
    medians = ", ".join(f"{part} {ratio:.1e}" for part, ratio in median.items())
    evidence = (
        f"update / weight after {steps} steps of warm-up, median over modules: {medians}; least {found[least]:.1e} "
        f"({least}), most {found[most]:.1e} ({most})"
    )
    if wrong:
        part, rate = next(iter(wrong.items()))
        return failed(
            f"{evidence}; after a step at rate 0, the one at the peak rate {peaks[part]:g} ran at {rate:g} ({part})",
            "the optimizer does not take the schedule's rate as it is: it keeps or multiplies that of earlier steps",
            "let each step set the rate to its peak times the schedule's factor",
            rates=wrong,
            **numbers,
        )
    rates = "set stages.<name>.optim.lr so that the medians lie between 1e-4 and 1e-2; check 13 tells where it breaks"
    if not any(median.values()) or not all(map(math.isfinite, found.values())) or 0.0 in median.values():
        return failed(evidence, "a part that gets no update, or one that is not finite: see check 6", rates, **numbers)
    if found[most] > IMPOSSIBLE_UPDATE:
        return failed(evidence, "one step replaces the weights: the learning rate is far too high", rates, **numbers)
    outside = [part for part, ratio in median.items() if not USUAL_UPDATE[0] <= ratio <= USUAL_UPDATE[1]]
    if outside:
        too = "low" if median[outside[0]] < USUAL_UPDATE[0] else "high"
        return warned(evidence, f"the rate of {', '.join(outside)} may be too {too}", rates, **numbers)
    return passed(evidence, **numbers)


@torch.no_grad()
def _module_weights(bench: Workbench) -> dict[str, Tensor]:
    """What each module multiplies with: of an adapted layer its weight with the adapter in it."""
    training = {name for group in bench.task.parameter_groups() for name in group.parameters}
    found = {}
    adapted = set()
    for name, layer in lora_layers(bench.model).items():
        own = {f"{name}.{side}" for side in ("lora_A", "lora_B")}
        if own <= training:
            found[name] = layer.merged_weight()
            adapted |= own
    parameters = dict(bench.model.named_parameters())
    for name in sorted(training - adapted):
        if name in parameters:
            found[name] = parameters[name].detach().clone()
    return found


def check_rate_range(bench: Workbench) -> Finding:
    """Check 13: the rates grow from a hundredth of those configured to many times them; where does it diverge?"""
    task = bench.task
    practice = Practice.of(task, [bench.begin()])
    until = time.monotonic() + RANGE_SECONDS
    bound = broken = math.inf
    losses: list[float] = []
    factors = [RANGE_FIRST * RANGE_GROWTH**step for step in range(RANGE_STEPS)]
    for step in range(RANGE_STEPS):
        record = practice.ramp(1, RANGE_FIRST, RANGE_GROWTH)[-1]
        losses.append(record.loss)
        bound = min(bound, losses[0] + DIVERGED)
        if not (math.isfinite(record.loss) and math.isfinite(record.grad_norm)) or record.loss > bound:
            broken = factors[max(0, step - 1)]  # the step before made this loss
            break
        if time.monotonic() > until:
            break
    bench.reset()
    if math.isinf(broken) and factors[len(losses) - 1] < 1:
        return skipped(f"{len(losses)} steps took {RANGE_SECONDS:.0f} s, before the rates were those configured")
    first = losses[0]
    lowest = min((loss for loss in losses if math.isfinite(loss)), default=math.nan)
    numbers: dict[str, Any] = {
        "diverges_at": None if math.isinf(broken) else broken,
        "first_loss": first,
        "lowest_loss": lowest,
    }
    numbers["tried_up_to"] = factors[len(losses) - 1]
    lines = [f"{factor:9.3f} × the rates: {loss:.3f}" for factor, loss in zip(factors, losses, strict=False)]
    ends = "no divergence" if math.isinf(broken) else f"it diverges at {broken:.2g} times"
    evidence = (
        f"loss from {first:.2f} down to {lowest:.2f} while the rates grew to {numbers['tried_up_to']:.2g} times those "
        f"configured: {ends}"
    )
    action = "lower stages.<name>.optim.lr to a third of where it diverges, or warm up for longer"
    if broken <= 1:
        return failed(evidence, "the configured rates are at or above divergence", action, lines, **numbers)
    if broken < NEAR_DIVERGENCE:
        return warned(evidence, "the configured rates are near divergence", action, lines, **numbers)
    return passed(evidence, lines, **numbers)


def check_accumulation(bench: Workbench) -> Finding:
    """Check 14: one batch of all rows, and a batch for each of them, in one step."""
    if bench.model.dtype != torch.float32:
        return skipped("16 bits round too much to tell: ask it with --model.dtype float32")
    task = bench.task
    bench.begin()
    rows = bench.several
    whole = [task.first_versions(rows)]
    single = [task.first_versions([row]) for row in rows]
    found = []
    for batches in (whole, single):
        practice = Practice.of(task, batches)
        record = practice.stand_still()
        gradients = [p.grad.detach().double().flatten() for p in practice.optimizer.parameters if p.grad is not None]
        found.append((record.loss, torch.cat(gradients) if gradients else torch.zeros(1).double()))
    bench.reset()
    (one_loss, one), (many_loss, many) = found
    norm = float(one.norm())
    gradient = float((one - many).norm()) / norm if norm else math.inf
    loss = abs(one_loss - many_loss) / max(abs(one_loss), 1e-12)
    tolerance = SAME_GRADIENT
    numbers: dict[str, Any] = {
        "loss_difference": loss,
        "gradient_difference": gradient,
        "tolerance": tolerance,
        "rows": len(rows),
    }
    evidence = (
        f"1 batch of {len(rows)} rows and {len(rows)} batches of 1 in one step: losses {one_loss:.6f} and "
        f"{many_loss:.6f}, which differ by {loss:.1e}, gradients by {gradient:.1e} of their norm (limit {tolerance:g})"
    )
    if not (loss <= tolerance and gradient <= tolerance):
        return failed(
            evidence,
            "averages are averaged: a batch of few tokens counts as much as one of many; or rows see each other",
            "add up sums and counts over all batches of a step, and divide once; see check 10",
            **numbers,
        )
    return passed(evidence, **numbers)


CHECKS = [
    Check(
        6,
        "what trains",
        "frozen checksums unchanged after 5 steps; trained tensors changed; gradients finite and not 0",
        Blame.FROZEN,
        check_trains,
        needs_rows,
    ),
    Check(
        7,
        "update / weight",
        "1e-4 … 1e-2 of each part after warm-up, else WARN; FAIL at 0 and above 1",
        Blame.RATE,
        check_update_ratio,
        needs_rows,
    ),
    Check(
        13,
        "learning-rate range",
        "FAIL where the rates are at or above divergence",
        Blame.RATE,
        check_rate_range,
        needs_rows,
    ),
    Check(
        14,
        "accumulation",
        "1×8 and 8×1 equal within 1e-5 in float32",
        Blame.ACCUMULATION,
        check_accumulation,
        needs_rows,
    ),
]
