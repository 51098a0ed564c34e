"""Checks 8 and 9: whether one batch can be learnt by heart, and whether the audio was needed for it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ultravox.diagnosis.finding import Blame, Check, Finding, failed, passed, skipped, warned
from ultravox.diagnosis.plain_forward import mean_loss, plain_row, row_embeddings, row_logits
from ultravox.diagnosis.practice import Practice
from ultravox.diagnosis.update_checks import checksums
from ultravox.diagnosis.workbench import Workbench, needs_tuned_rows
from ultravox.training.batches import SpeechBatch

MOST_STEPS, CHUNK = 300, 10
LEARNT = 0.05
"""Nats a token."""
MOST_SECONDS = 100.0
"""For learning by heart, on a machine that is too slow for 300 steps."""
ENOUGH_STEPS = 40
"""In which a loss has at least halved, where anything can be learnt."""
CERTAIN = 0.01
"""Nats a token: what is known so well is decoded rightly, however little time there was."""
LEAST_RISE = 1.0
"""Nats a token that another row's audio must cost."""


@dataclass(frozen=True, slots=True)
class Overfit:
    """What came of learning a few rows by heart."""

    steps: int
    losses: list[float]
    loss: float
    swapped_loss: float
    """Of a token, with the audio of another row."""
    deciding: tuple[float, float]
    """Of the first token in which two rows differ, with the own audio and the other's: only audio can decide there."""
    exact: int
    """Rows whose greedy decoding is what they should say."""
    rows: int
    decoded: list[tuple[str, str]]
    """Expected and decoded texts of rows that differ."""
    in_time: bool
    changed: list[str]
    """Weights that decoding has changed."""


def overfit(bench: Workbench) -> Overfit:
    """Train on the few rows until they are known, 300 steps at most. Made once; the weights go back afterwards."""
    kept = bench.__dict__.get("overfit")
    if kept is None:
        kept = bench.__dict__["overfit"] = _overfit(bench)
    return kept


@contextmanager
def _every_position(projector: Any) -> Iterator[None]:
    """Without compression: which positions an unlearnt one drops changes from step to step, and hides what is learnt.

    Checks 2, 5 and 10 look at it as it is.
    """
    compresses, projector.compresses = projector.compresses, False
    try:
        yield
    finally:
        projector.compresses = compresses


def _overfit(bench: Workbench) -> Overfit:
    with _every_position(bench.model.multi_modal_projector):
        return _learn_by_heart(bench)


def _learn_by_heart(bench: Workbench) -> Overfit:
    batch = bench.begin()
    practice = Practice.of(bench.task, [batch])
    until = time.monotonic() + MOST_SECONDS
    exact, wrong, in_time = 0, [("", "")], True
    changed: list[str] | None = None
    while practice.state.step < MOST_STEPS and wrong and in_time:
        record = practice.train_of(CHUNK, MOST_STEPS)
        if _answers_are_learnt(bench, batch, record.loss):
            weights = checksums(dict(bench.model.named_parameters())) if changed is None else {}
            exact, wrong = _decode(bench, batch)
            if changed is None:
                now = checksums(dict(bench.model.named_parameters()))
                changed = [name for name, value in weights.items() if now[name] != value]
        in_time = time.monotonic() < until
    loss, swapped = (_loss(bench, each) for each in (batch, with_text_of_next(batch)))
    deciding = _deciding_losses(bench, batch)
    losses = [record.loss for record in practice.records]
    bench.reset()
    in_time = in_time or practice.state.step >= MOST_STEPS
    learnt = (exact, len(batch.ids), wrong, in_time, changed or [])
    return Overfit(practice.state.step, losses, loss, swapped, deciding, *learnt)


def _answers_are_learnt(bench: Workbench, batch: SpeechBatch, loss: float) -> bool:
    """Whether the loss of the answers is low enough; where prompts count too, theirs may stay high."""
    if bench.tune.stage.tune.loss_mask in ("response", "assistant_turns"):
        return loss < LEARNT
    bench.model.eval()
    embeddings = row_embeddings(bench.tune, batch)
    rows = zip(batch.input_ids, batch.supervised, embeddings, strict=True)
    return mean_loss(bench.model, [plain_row(bench.tune, *row) for row in rows]) < LEARNT


def _loss(bench: Workbench, batch: SpeechBatch) -> float:
    """Of a token. Through the training path, since that is what was trained."""
    bench.task.train_mode()
    output = bench.task.loss(batch)
    return float(output.sum.detach()) / max(1.0, output.count)


def _deciding_losses(bench: Workbench, batch: SpeechBatch) -> tuple[float, float]:
    """Mean loss of the first token in which each row departs from the next one, with its own audio and the next's.

    What follows such a token can be told from it, once the texts are known by heart: a mean over all tokens would mix
    the use of the audio with the length of the texts.
    """
    bench.model.eval()
    heard = row_embeddings(bench.tune, batch)
    sums = [0.0, 0.0]
    for index, (ids, supervised) in enumerate(zip(batch.input_ids, batch.supervised, strict=True)):
        other = (index + 1) % len(batch.ids)
        said, others = ids[supervised], batch.input_ids[other][batch.supervised[other]]
        length = min(len(said), len(others))
        place = int(np.argmax(said[:length] != others[:length])) if (said[:length] != others[:length]).any() else length
        for which, embeddings in enumerate((heard[index], heard[other])):
            row = plain_row(bench.tune, ids, supervised, embeddings, batch.ids[index])
            at = np.flatnonzero(row.supervised)[min(place, len(said) - 1)]
            sums[which] -= float(row_logits(bench.model, row)[at - 1].log_softmax(-1)[int(row.ids[at])])
    return sums[0] / len(batch.ids), sums[1] / len(batch.ids)


def _decode(bench: Workbench, batch: SpeechBatch) -> tuple[int, list[tuple[str, str]]]:
    """How many rows are decoded as they should be, and those that are not."""
    tokenizer = bench.processor.tokenizer
    bench.model.eval()
    with torch.no_grad():
        said = [text.strip() for text in bench.task.transcribe(bench.few)]
    meant = [
        tokenizer.decode(ids[supervised], skip_special_tokens=True).strip()
        for ids, supervised in zip(batch.input_ids, batch.supervised, strict=True)
    ]
    wrong = [(expected, found) for expected, found in zip(meant, said, strict=True) if expected != found]
    return len(meant) - len(wrong), wrong


def with_text_of_next(batch: SpeechBatch) -> SpeechBatch:
    """Each row's recording with the conversation of the row after it."""
    order = np.roll(np.arange(len(batch.ids)), -1).tolist()
    return replace(
        batch,
        input_ids=[batch.input_ids[index] for index in order],
        supervised=[batch.supervised[index] for index in order],
    )


def check_overfit(bench: Workbench) -> Finding:
    """Check 8."""
    found = overfit(bench)
    numbers: dict[str, Any] = {"steps": found.steps, "loss": found.loss, "exact": found.exact, "rows": found.rows}
    every = max(1, len(found.losses) // 12)
    lines = [f"step {step + 1:3d}: {found.losses[step]:.4f}" for step in range(0, len(found.losses), every)]
    evidence = (
        f"after {found.steps} steps on {found.rows} rows the loss is {found.loss:.4f} nats a token, and {found.exact} "
        "of them are decoded exactly"
    )
    if found.changed:
        return failed(
            f"decoding has changed {len(found.changed)} weights, such as {found.changed[0]}",
            "adapters that are merged for generation and not taken out again, or a pass that writes into its weights",
            "look at merged_lora, and at what generation does before and after it",
            lines,
            **numbers,
        )
    if found.exact == found.rows:
        return passed(evidence, lines, **numbers)
    last, first = min(found.losses[-CHUNK:]), found.losses[0]
    lines += [f"expected {expected!r}, decoded {said!r}" for expected, said in found.decoded if expected]
    too_slow = len(found.losses) < ENOUGH_STEPS or last < first / 2
    if not found.in_time and last >= CERTAIN and too_slow:
        return warned(
            f"{evidence}; the time was up before {MOST_STEPS} steps",
            "a machine that is too slow for this check, or rates that are too low",
            "run `--checks 8` alone on a faster machine, or raise stages.<name>.optim.lr",
            lines,
            **numbers,
        )
    if last < LEARNT:
        return failed(
            f"{evidence}: the loss is learnt, the decoding is not",
            "training and generation differ: prompt, positions, padding side, masks or merged adapters",
            "hold the logits of generation against those of training on one row",
            lines,
            **numbers,
        )
    return failed(
        evidence,
        "the gradient does not reach what could learn this, the rates do not fit, or what trains is too small",
        "look at checks 6, 7 and 13; raise the projector's rate; try a higher rank of the adapters",
        lines,
        **numbers,
    )


def check_audio_needed(bench: Workbench) -> Finding:
    """Check 9."""
    found = overfit(bench)
    if found.exact < found.rows:
        return skipped("the rows were not learnt by heart (check 8), so it cannot be told by what")
    own, other = found.deciding
    rise = other - own
    numbers: dict[str, Any] = {"loss": found.loss, "swapped_loss": found.swapped_loss}
    numbers |= {"deciding_loss": own, "swapped_deciding_loss": other, "rise": rise}
    evidence = (
        f"with the audio of another row the loss of the first token in which the two differ goes from {own:.3f} to "
        f"{other:.3f} (of all tokens from {found.loss:.3f} to {found.swapped_loss:.3f} nats)"
    )
    if not rise >= LEAST_RISE:
        return failed(
            f"{evidence}: by {rise:.2f}, expected at least {LEAST_RISE:g}",
            "the rows were learnt from their prompts: the text has leaked into them, or the audio does not get through",
            "read the rows of check 1: nothing but the audio may tell them apart",
            **numbers,
        )
    return passed(f"{evidence}: up by {rise:.2f}", **numbers)


CHECKS = [
    Check(
        8,
        "overfit one batch",
        "loss of the answers < 0.05 and exact greedy decoding within 300 steps",
        Blame.MODEL,
        check_overfit,
        needs_tuned_rows,
    ),
    Check(
        9,
        "audio permuted",
        "the loss of the learnt batch rises by 1 nat or more, where two of its texts part",
        Blame.AUDIO,
        check_audio_needed,
        needs_tuned_rows,
    ),
]
