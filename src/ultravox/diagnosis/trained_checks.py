"""Checks 11 and 12, of trained weights: whether held-out audio is used, and whether the loss still falls."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ultravox.data.collate import loss_mask
from ultravox.diagnosis.finding import Blame, Check, Finding, failed, passed, skipped, warned
from ultravox.diagnosis.plain_forward import Row, plain_row, row_embeddings, row_losses
from ultravox.diagnosis.workbench import Workbench, needs_tuning
from ultravox.errors import DataError
from ultravox.metrics.bootstrap import paired_bootstrap
from ultravox.training.examples import Example

FEWEST_CLIPS = 5
LAST_SHARE = 0.2
FEWEST_POINTS = 10
NUM_SAMPLES = 1000
RISEN = 0.1
"""Share of the loss by which it must have risen over the last fifth to be called a fault."""


def check_held_out(bench: Workbench) -> Finding:
    """Check 11: the response's loss with the transcript, the audio, another clip's, silence, and nothing."""
    examples = [example for example in bench.data.progress_examples if _has_one_window(example)]
    if len(examples) < FEWEST_CLIPS:
        return skipped(
            f"{len(examples)} clips are kept out of training, expected {FEWEST_CLIPS} or more: raise "
            "evaluation.num_progress_clips"
        )
    bench.reset()
    bench.model.eval()
    losses, counts = {}, [0]
    for letter, rows in _versions(bench, examples).items():
        losses[letter], counts = row_losses(bench.model, rows)
    total = sum(counts)
    mean = {letter: sum(values) / total for letter, values in losses.items()}
    paired = paired_bootstrap(losses["A"], losses["S"], counts, seed=bench.config.seed)  # type: ignore[arg-type]
    low, high = paired.interval
    room = mean["S"] - mean["U"]
    use = (mean["S"] - mean["A"]) / room if room > 0 else None
    numbers: dict[str, Any] = {
        "losses": mean,
        "interval": [low, high],
        "audio_use": use,
        "clips": len(examples),
        "tokens": total,
    }
    told = ", ".join(f"{name} {mean[letter]:.3f}" for letter, name in NAMES.items())
    evidence = (
        f"nats a token on {len(examples)} kept-out clips: {told}; another clip's audio costs {paired.value:.3f} "
        f"[{low:.3f}, {high:.3f}]"
    )
    evidence += f", which is {use:.0%} of what is to be had" if use is not None else ""
    if low <= 0:
        return failed(
            evidence + ": the interval includes 0",
            "the model does not use the audio of clips that it has not seen: too little training, audio and text that "
            "do not belong together, or audio that does not get through",
            "train an align stage first or for longer; look at checks 1, 5 and 9 and listen to some rows",
            **numbers,
        )
    return passed(evidence, **numbers)


NAMES = {"U": "transcript", "A": "audio", "S": "another clip's", "Z": "silence", "N": "nothing"}


def _versions(bench: Workbench, examples: list[Example]) -> dict[str, list[Row]]:
    """The rows of each version."""
    task = bench.tune
    batch = task.first_versions(examples)
    heard = row_embeddings(task, batch)
    silent = [_silence(bench, example) for example in examples]
    kind = task.stage.tune.loss_mask
    found: dict[str, list[Row]] = {letter: [] for letter in NAMES}
    for index, example in enumerate(examples):
        ids = batch.input_ids[index]
        mask = loss_mask(ids, batch.supervised[index], task.audio_token_id, kind)
        other = heard[(index + 1) % len(heard)]
        for letter, embeddings in (("A", heard[index]), ("S", other), ("Z", silent[index]), ("N", None)):
            found[letter].append(plain_row(task, ids, mask, embeddings, example.id))
        found["U"].append(_spelt_out(ids, mask, example.transcript, task.audio_token_id))
    return found


def _spelt_out(ids: np.ndarray, mask: np.ndarray, transcript: np.ndarray, audio_token_id: int) -> Row:
    """The transcript's tokens in the place of the audio."""
    place = int(np.flatnonzero(ids == audio_token_id)[0])
    joined = np.concatenate([ids[:place], transcript, ids[place + 1 :]])
    unsupervised = np.zeros(len(transcript), dtype=bool)
    return Row(joined, np.concatenate([mask[:place], unsupervised, mask[place + 1 :]]), None)


@torch.no_grad()
def _silence(bench: Workbench, example: Example) -> torch.Tensor:
    """What the model is given of digital silence as long as a clip."""
    from ultravox.audio.lengths import SAMPLE_RATE
    from ultravox.data.collate import pad_frames

    waveform = np.zeros(round(example.versions[0].seconds * SAMPLE_RATE), dtype=np.float32)
    values, lengths = pad_frames([bench.task.features.heard(waveform)[0]])
    projected, count = bench.model.project(*bench.model.encode_audio(values.transpose(1, 2), lengths))
    return projected[0, : int(count[0])]


def _has_one_window(example: Example) -> bool:
    return [len(windows) for windows in example.versions[0].frames] == [1] and len(example.transcript) > 0


def check_slope(bench: Workbench) -> Finding:
    """Check 12: Theil–Sen on the last fifth of the stage's losses, with an interval by a moving-block bootstrap."""
    assert bench.checkpoint is not None
    steps, losses = read_losses(bench.checkpoint / "log.jsonl", bench.stage.name)
    begin = len(steps) - max(FEWEST_POINTS, round(LAST_SHARE * len(steps)))
    if begin < 0:
        return skipped(
            f"the log holds {len(steps)} losses of the stage, expected {FEWEST_POINTS} or more: lower log_every"
        )
    steps, losses = steps[begin:], losses[begin:]
    slope, (low, high) = slope_interval(steps, losses, seed=bench.config.seed)
    span, level = float(steps[-1] - steps[0]), float(np.median(losses))
    numbers: dict[str, Any] = {"slope": slope, "interval": [low, high], "points": len(steps), "level": level}
    evidence = (
        f"the last {len(steps)} losses of the log, steps {steps[0]:.0f} to {steps[-1]:.0f}: around {level:.3f}, slope "
        f"{slope * 100:+.4f} nats in 100 steps [{low * 100:+.4f}, {high * 100:+.4f}]"
    )
    if high < 0:
        return passed(f"{evidence}: it falls", **numbers)
    if low > 0 and slope * span > RISEN * level:
        return failed(
            f"{evidence}: it rises",
            "training diverges, slowly",
            "lower the learning rate, or go back to the checkpoint before; look for spike_ids in the log",
            **numbers,
        )
    return warned(
        f"{evidence}: flat, since the interval includes 0" if low <= 0 else f"{evidence}: it rises a little",
        "the run has come to its end: the rate has decayed, or what trains can learn no more from these data",
        "where check 11 passes this is no bug: more data, a higher rank, a higher rate or more steps",
        **numbers,
    )


def read_losses(path: Path, stage: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and losses of a stage in a log. DataError when the file is none."""
    steps, losses = [], []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: expected the log of a run ({error.strerror})") from error
    for number, line in enumerate(lines, start=1):
        try:
            row: dict[str, Any] = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number} is not JSON: expected the log of a run") from error
        if row.get("stage") == stage and row.get("loss") is not None:
            steps.append(row["step"])
            losses.append(row["loss"])
    return np.array(steps, dtype=float), np.array(losses, dtype=float)


def theil_sen(x: np.ndarray, y: np.ndarray) -> float:
    """Median of the slopes between all pairs (Theil 1950, Sen 1968): outliers do not move it."""
    first, second = np.triu_indices(len(x), 1)
    return float(np.median((y[second] - y[first]) / (x[second] - x[first])))


def slope_interval(
    x: np.ndarray, y: np.ndarray, *, seed: int = 0, num_samples: int = NUM_SAMPLES, confidence: float = 0.95
) -> tuple[float, tuple[float, float]]:
    """Theil–Sen slope and its percentile interval.

    Residuals are drawn in blocks of neighbours (Künsch 1989, moving blocks of about n^(1/3)), since those of a loss
    curve depend on each other.
    """
    slope = theil_sen(x, y)
    fitted = slope * x + float(np.median(y - slope * x))
    residuals = y - fitted
    block = max(2, round(len(x) ** (1 / 3)))
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, len(x) - block + 1, size=(num_samples, -(-len(x) // block)))
    drawn = (starts[..., None] + np.arange(block)).reshape(num_samples, -1)[:, : len(x)]
    slopes = [theil_sen(x, fitted + residuals[places]) for places in drawn]
    low, high = np.quantile(slopes, [(1 - confidence) / 2, (1 + confidence) / 2])
    return slope, (float(low), float(high))


def _needs_weights(bench: Workbench) -> str:
    return needs_tuning(bench) or (
        "" if bench.checkpoint is not None else "fresh weights have learnt nothing yet: give --checkpoint RUN"
    )


CHECKS = [
    Check(
        11,
        "held-out loss",
        "FAIL if the interval of L(another clip's audio) − L(audio) includes 0",
        Blame.AUDIO,
        check_held_out,
        _needs_weights,
    ),
    Check(
        12,
        "slope against noise",
        "Theil–Sen on the last 20% of the log, block bootstrap: flat only if the interval includes 0",
        Blame.SLOPE,
        check_slope,
        _needs_weights,
    ),
]
