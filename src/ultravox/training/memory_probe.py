"""Measuring what a batch takes: batches of any shape for a real task, and the peak of memory while one runs.

On a CPU the peak is the largest resident memory of the process while a batch is run forwards and backwards, less the
resident memory before it, when all freed memory has been given back (`release_freed_memory`): training keeps freed
memory, so without that a batch would seem to take only what it needs beyond the batch before it. The batch's own
frames, a few megabytes that the loader makes ahead, are not in it. On a GPU it is the same of the allocator's own
counts.
"""

import gc
from collections.abc import Callable, Sequence

import numpy as np
import torch

from ultravox.audio.lengths import MAX_WINDOW_SAMPLES, SAMPLE_RATE
from ultravox.data.collate import pad_frames
from ultravox.data.examples import TokenisedExample
from ultravox.errors import UltravoxError
from ultravox.training.batches import SpeechBatch
from ultravox.training.measure import memory_bytes
from ultravox.training.memory import keep_freed_memory, release_freed_memory
from ultravox.training.memory_model import Measure, MemoryModel, calibrate, spread_rows
from ultravox.training.progress import bar
from ultravox.training.speech_task import SpeechTask

PROMPT_TOKENS = 3  # before the audio; all others are supervised, which takes most


def make_probe(task: SpeechTask, rows: Sequence[tuple[int, int]]) -> SpeechBatch:
    """A batch of so many audio tokens and text tokens each: noise that is heard, and words of the task's own examples.

    All text but the first words is supervised. Audio over 30 s may get a token more for each further window.
    """
    generator = np.random.default_rng(0)
    words = np.concatenate([example.transcript for example in task.examples[:100]])
    features, encoder, stack = task.features, task.model.audio_tower, task.maker.stack_factor
    pieces: dict[int, list[np.ndarray]] = {}
    windows: list[np.ndarray] = []
    nothing = torch.zeros(0)
    batch = SpeechBatch([], [], [], [], [], [], [], [], nothing, nothing, task.maker.encoded, [], [])
    for index, (audio_tokens, text_tokens) in enumerate(rows):
        if audio_tokens not in pieces:
            waveform = 0.1 * generator.standard_normal(_num_samples(encoder, audio_tokens * stack)).astype(np.float32)
            heard = features.heard(waveform)
            pieces[audio_tokens] = features.slots.split(features.encode([waveform])[0]) if batch.encoded else heard
        mine = pieces[audio_tokens]
        prompt = max(0, min(PROMPT_TOKENS, text_tokens - 1))
        ids = np.resize(words, text_tokens + 1)
        ids[prompt] = task.model.config.audio_token_index
        batch.ids.append(f"probe-{index}")
        batch.uids.append(f"probe-{index}")
        batch.sources.append(0)
        batch.input_ids.append(ids)
        batch.supervised.append(np.arange(len(ids)) > prompt)
        if task.maker.with_text:
            batch.as_text.append(TokenisedExample(np.delete(ids, prompt), np.delete(batch.supervised[-1], prompt)))
        if task.maker.cutter is not None:
            batch.whole.append(True)
        batch.transcripts.append(np.resize(words, max(1, audio_tokens // 2)))  # CTC has room for no more
        batch.audio_tokens.append([task.maker.audio_tokens(task.maker.frames(mine))])
        batch.num_windows.append(len(mine))
        batch.seconds.append(0.0)
        windows += mine
    batch.values, batch.lengths = pad_frames(windows)
    batch.augment_seed = ("probe",)
    return batch


def _num_samples(encoder: object, num_frames: int) -> int:
    """The fewest samples that an encoder makes so many frames of; beyond a window, by the encoder's rate."""
    per_frame = SAMPLE_RATE // encoder.frames_per_second  # type: ignore[attr-defined]
    whole = num_frames * per_frame
    if whole > MAX_WINDOW_SAMPLES:
        return whole
    while encoder.output_length(whole) < num_frames:  # type: ignore[attr-defined]
        whole += per_frame
    return whole


def run_probe(task: SpeechTask, batch: SpeechBatch) -> None:
    """Run a batch forwards and backwards; the gradients are thrown away."""
    parameters = [p for group in task.parameter_groups() for p in group.parameters.values()]
    try:
        task.loss(batch).sum.backward()
    finally:
        for parameter in parameters:
            parameter.grad = None


def calibrate_task(task: SpeechTask) -> MemoryModel:
    """A model of what a task's batches take, from a few that are run, within the stage's limit where it has one.

    Draws no random number of the run.
    """
    limit = task.stage.max_batch_memory_gb
    keep_freed_memory()  # as training does
    with torch.random.fork_rng(), bar("measuring memory", unit="batches") as on_probe:
        return calibrate(
            measure_task(task),
            max_batch_tokens=task.stage.max_batch_tokens,
            max_audio_tokens=max(1, int(task.audio_tokens.max())),
            max_text_tokens=int(task.text_tokens.max()),
            max_bytes=None if limit is None else round(limit * 1e9),
            on_probe=on_probe,
        )


def measure_task(task: SpeechTask) -> Measure:
    """For `calibrate`: measures batches made for this task, on the device of its model."""
    peak = peak_on_gpu if task.model.device.type == "cuda" else peak_on_cpu
    task.train_mode()

    def measure(num_rows: int, audio_tokens: int, text_tokens: int) -> int:
        probe = make_probe(task, spread_rows(num_rows, audio_tokens, text_tokens))
        return peak(lambda: run_probe(task, probe))

    return measure


def peak_on_cpu(run: Callable[[], None]) -> int:
    """Bytes by which the process's resident memory rises at most while `run` runs, above what it holds before.

    Raises:
        UltravoxError: the system does not count so; Linux does.
    """
    gc.collect()
    release_freed_memory()
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak begins anew (proc(5))
    except OSError as error:
        raise UltravoxError(
            f"peak memory cannot be measured here (/proc/self/clear_refs: {error.strerror}): "
            "remove max_batch_memory_gb and set max_batch_tokens instead"
        ) from error
    before = memory_bytes()
    run()
    return max(0, _resident_peak_bytes() - before)


def _resident_peak_bytes() -> int:
    """The largest resident memory since the peak began anew."""
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def peak_on_gpu(run: Callable[[], None]) -> int:
    """Bytes by which tensors on the GPU take more at most while `run` runs, above what they take before.

    That is what is asked of the allocator; what it sets aside in blocks, and other libraries, come on top.
    """
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return max(0, torch.cuda.max_memory_allocated() - before)
