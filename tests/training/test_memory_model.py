"""What a batch takes is predicted from a few that were measured: on invented memory, and on a real task's."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ultravox.errors import DataError
from ultravox.training.memory_model import (
    MIN_PROBES,
    TERMS,
    MemoryModel,
    OfLongest,
    calibrate,
    fit,
    probe_shapes,
    spread_rows,
)

LIMITS = {"max_batch_tokens": 1500, "max_audio_tokens": 300, "max_text_tokens": 80}


def invented(rows, audio, text, longest=None):
    """Bytes of a batch: a constant, per position, and squares of the rows' lengths up to 128 positions."""
    length = (audio + text) / rows if longest is None else longest
    kept = np.where(length <= 128, 1080.0, 110.0)
    return 4.7e8 + 1.0e6 * (audio + text) + 5e4 * audio + kept * rows * length**2


def calibrated(noise=0.0, seed=0, measure=invented, **limits):
    random = np.random.default_rng(seed)
    return calibrate(lambda *shape: int(measure(*shape) * (1 + noise * random.uniform(-1, 1))), **{**LIMITS, **limits})


def random_shapes(count=500):
    """Rows, audio tokens, text tokens and the longest row of batches within the limits."""
    random = np.random.default_rng(1)
    audio, text = random.integers(4, 300, count), random.integers(10, 80, count)
    rows = np.maximum(1, (random.uniform(400, 1500, count) / (audio + text)).astype(int))
    return rows, rows * audio, rows * text, audio + text


@pytest.mark.parametrize("seed", range(5))
def test_predictions_are_never_below_and_little_above(seed):
    model = calibrated(noise=0.01, seed=seed)
    rows, audio, text, longest = random_shapes()
    share = model.predict(rows, audio, text, longest) / invented(rows, audio, text, longest)
    assert share.min() >= 1
    assert share.max() <= 1.15


def test_no_coefficient_is_negative_and_each_term_is_known():
    for seed in range(5):
        model = calibrated(noise=0.05, seed=seed)
        assert min(model.coefficients.values()) >= 0
        assert set(model.coefficients) <= set(TERMS)
        assert "constant" in model.coefficients


def test_a_worse_fit_has_a_wider_margin():
    assert calibrated(noise=0.0).margin < calibrated(noise=0.03).margin < calibrated(noise=0.15).margin


def test_many_batches_are_predicted_at_once_as_one_by_one():
    model = calibrated()
    columns = random_shapes(20)
    together = model.predict(*columns)
    assert together.dtype == np.int64
    assert together.tolist() == [int(model.predict(*each)) for each in zip(*(c.tolist() for c in columns), strict=True)]


def test_a_longer_row_among_short_ones_takes_more():
    model = calibrated()
    assert model.predict(10, 500, 300, 120) > model.predict(10, 500, 300) == model.predict(10, 500, 300, 80)


@pytest.mark.parametrize("term", TERMS)
def test_a_plan_that_knows_the_longest_row_alone_never_predicts_less(term):
    """Of each term by itself; rows that differ by little are the hard case."""
    model, random = MemoryModel({"constant": 1e6, term: 1000.0}, margin=0.05), np.random.default_rng(2)
    for _ in range(200):
        count = int(random.integers(1, 30))
        audio, text = (int(random.integers(4, 100)) + random.integers(0, 6, count) for _ in range(2))
        exact = model.predict(count, audio.sum(), text.sum(), (audio + text).max())
        planned = OfLongest(model).predict(np.array([count]), audio.max(keepdims=True), text.max(keepdims=True))
        assert planned[0] >= exact


@pytest.mark.parametrize("term", TERMS)
def test_what_a_plan_is_told_does_not_fall_when_a_number_grows(term):
    model = OfLongest(MemoryModel({"constant": 1e6, term: 1000.0}, margin=0.05))
    grid = np.meshgrid(np.arange(1, 12), np.arange(1, 150, 3), np.arange(0, 40, 5), indexing="ij")
    predicted = model.predict(*(axis.ravel() for axis in grid)).reshape(grid[0].shape)
    for axis in range(3):
        assert (np.diff(predicted, axis=axis) >= 0).all()


def test_json_brings_it_back():
    model = calibrated(noise=0.02)
    again = MemoryModel.from_json(json.loads(json.dumps(model.to_json())))
    assert again == model
    assert again.fingerprint == model.fingerprint
    assert calibrated(noise=0.02, seed=1).fingerprint != model.fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2"),
        ({"coefficients": {"moon": 1.0}}, "'moon'"),
        ({"coefficients": {"tokens": -1.0}}, "negative"),
        ({"margin": -0.1}, "negative"),
    ],
)
def test_what_is_not_such_a_model_is_refused(change, message):
    with pytest.raises(DataError, match=message):
        MemoryModel.from_json({**calibrated().to_json(), **change})


def test_probes_are_a_handful_of_small_and_large_batches():
    shapes = probe_shapes(1500, 300, 80)
    assert 8 <= len(shapes) == len(set(shapes)) <= 16
    totals = [audio + text for _, audio, text in shapes]
    assert totals == sorted(totals)
    assert totals[0] < 60
    assert 1300 < totals[-1] <= 1500
    assert all(rows > 0 and audio % rows == text % rows == 0 for rows, audio, text in shapes)
    assert max((audio + text) / rows for rows, audio, text in shapes) == 380


@pytest.mark.parametrize("limits", [(50, 20, 12), (600, 150, 0), (100, 1, 0), (100, 1, 3), (400, 400, 0)])
def test_there_are_enough_probes_whatever_the_rows_are_like(limits):
    max_batch_tokens, max_audio_tokens, max_text_tokens = limits
    shapes = probe_shapes(*limits)
    assert len(shapes) >= MIN_PROBES
    for rows, audio, text in shapes:
        assert audio + text <= max_batch_tokens
        assert 1 <= audio / rows <= max_audio_tokens
        assert bool(text) == bool(max_text_tokens), "as the task's own rows"


@pytest.mark.parametrize("shape", [(1, 1, 4), (7, 7, 28), (12, 20, 48), (30, 1110, 300), (9, 0, 100)])
def test_rows_of_a_measured_batch_sum_up_to_its_shape_and_all_hear_something(shape):
    num_rows, audio_tokens, _ = shape
    rows = spread_rows(*shape)
    audio, text = zip(*rows, strict=True)
    assert (len(rows), sum(audio), sum(text)) == shape
    assert min(text) >= 4
    assert min(audio) >= min(1, audio_tokens)
    mean = audio_tokens / num_rows
    assert all(0.9 * mean - 1 <= count <= 1.1 * mean + 1 for count in audio)


def test_batches_that_do_not_fit_are_left_out_of_the_calibration():
    def measure(rows, audio, text):
        if audio + text > 1400:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"
            )
        return int(invented(rows, audio, text))

    model = calibrated(measure=measure)
    assert max(audio + text for _, audio, text, _ in model.probes) <= 1400
    assert model.predict(20, 1000, 1000) > invented(20, 1000, 1000)
    told = []
    calibrated(on_probe=lambda done, total: told.append((done, total)))
    assert told == [(number, len(told) - 1) for number in range(len(told))]
    for name, error in [("lower max_batch_tokens", MemoryError()), ("a bug", ValueError("a bug"))]:
        with pytest.raises((DataError, ValueError), match=name):
            calibrate(lambda r, a, t, error=error: 10**8 if a + t < 100 else _raise(error), **LIMITS)


def _raise(error):
    raise error


@pytest.mark.parametrize("noise", [0.0, 0.02])
@pytest.mark.parametrize("limit", [0.8e9, 1.2e9, 1.6e9, 2.0e9, 1e12])
def test_no_batch_is_measured_that_takes_more_than_the_limit_and_predictions_hold_within_it(limit, noise):
    taken = []

    def measure(*shape):
        taken.append(invented(*shape))
        return taken[-1]

    model = calibrated(noise=noise, measure=measure, max_bytes=round(limit))
    assert max(taken) <= limit
    assert max(taken) > 0.65 * min(limit, invented(5, 1175, 325))
    assert len(model.probes) >= MIN_PROBES
    rows, audio, text, longest = random_shapes()
    predicted, real = model.predict(rows, audio, text, longest), invented(rows, audio, text, longest)
    fits = predicted <= limit
    assert (real[fits] <= limit).all()
    assert (predicted[real <= limit] >= real[real <= limit]).all()


def test_a_limit_below_what_the_smallest_batches_take_runs_those_alone():
    """The planner says then what does not fit."""
    sizes = []
    model = calibrated(measure=lambda *shape: sizes.append(shape[1] + shape[2]) or invented(*shape), max_bytes=1)
    assert max(sizes) <= 50
    assert len(model.probes) >= MIN_PROBES
    assert model.predict(1, 300, 80) > 1


@pytest.mark.parametrize("limits", [(50, 20, 12), (600, 150, 0), (100, 1, 0), (100, 1, 3), (400, 400, 0)])
def test_a_limit_leaves_enough_probes_whatever_the_rows_are_like(limits):
    names = ("max_batch_tokens", "max_audio_tokens", "max_text_tokens")
    for max_bytes in (1, 600_000_000, 10**12):
        model = calibrated(max_bytes=max_bytes, **dict(zip(names, limits, strict=True)))
        assert len(model.probes) >= MIN_PROBES


def test_the_best_terms_are_found_by_what_they_predict():
    """Memory of one term only: no other gets a coefficient that matters, whatever the noise would like."""
    shapes = probe_shapes(1500, 300, 80)
    random = np.random.default_rng(0)
    model = fit([(r, a, t, int(1e8 + 1e6 * (a + t) * random.uniform(0.999, 1.001))) for r, a, t in shapes])
    rows, audio, text, longest = random_shapes()
    plain = model.predict(rows, audio, text, longest) / (1 + model.margin)
    np.testing.assert_allclose(plain, 1e8 + 1e6 * (audio + text), rtol=0.02)


PEAKS = """
import json, torch
from ultravox.training.memory_probe import peak_on_cpu
held = [torch.ones(20_000_000)]

def run():
    first = torch.ones(25_000_000)  # 100 MB
    del first
    second, third = torch.ones(25_000_000), torch.ones(12_500_000)
    assert len(second) > len(third)

peak = peak_on_cpu(run)
del held[0]
print(json.dumps([peak, peak_on_cpu(lambda: None)]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not count peaks")
def test_the_peak_is_what_was_held_at_once_and_not_what_was_held_before():
    """In a process of its own: the heap of one that ran a thousand tests has free pages that it cannot give back."""
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, nothing = json.loads(done.stdout)
    assert peak == pytest.approx(150e6, rel=0.05)
    assert nothing < 5e6


REAL = """
import gc, json, resource, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from tiny_run import save_tiny_models, save_tones, tiny_config
from transformers import LlamaConfig, LlamaForCausalLM
from ultravox.model.factory import build_model, build_processor
from ultravox.model.fast import use_fast_kernels
from ultravox.training.memory import keep_freed_memory, release_freed_memory
from ultravox.training.memory_model import calibrate
from ultravox.training.memory_probe import make_probe, measure_task, peak_on_cpu, run_probe
from ultravox.training.speech import prepare_speech
from ultravox.training.splitting import is_out_of_memory
from ultravox.training.tune import TuneTask

folder = Path(sys.argv[2])
models = save_tiny_models(folder)
small = LlamaConfig.from_pretrained(models[0])
small.update(dict(hidden_size=256, intermediate_size=768, num_hidden_layers=4, head_dim=64))
LlamaForCausalLM(small).save_pretrained(models[0])
config = tiny_config(models, save_tones(folder / "tones", 12), folder / "run")
processor, model = build_processor(config.model), build_model(config.model)
use_fast_kernels(model)
task = TuneTask(model, processor, prepare_speech(config, model, processor), config.stages[1], 0)
keep_freed_memory()
memory = calibrate(measure_task(task), max_batch_tokens=1500, max_audio_tokens=200, max_text_tokens=60)
random = np.random.default_rng(0)

def batch(tokens):
    audio, text = int(random.integers(10, 200)), int(random.integers(10, 60))
    count = max(1, tokens // (audio + text))
    return [(audio + int(more), text) for more in random.integers(0, max(1, audio // 8), count)]

def predicted(rows):
    audio, text = np.array(rows).T
    return int(memory.predict(len(rows), audio.sum(), text.sum(), (audio + text).max()))

pairs = []
for _ in range(6):
    rows = batch(int(random.integers(700, 1500)))
    probe = make_probe(task, rows)
    pairs.append((predicted(rows), peak_on_cpu(lambda: run_probe(task, probe))))
fits, large = make_probe(task, [(200, 60)] * 5), make_probe(task, [(200, 60)] * 30)
assert predicted([(200, 60)] * 30) > 3 * predicted([(200, 60)] * 5)
run_probe(task, fits)  # or products compiled below, when the heap has taken all that is allowed, would find no room
gc.collect()
release_freed_memory()
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
slack = 64 << 20  # holes between what is kept
resource.setrlimit(resource.RLIMIT_AS, (size + predicted([(200, 60)] * 5) + slack, -1))
try:
    run_probe(task, large)
    failed = "it fitted"
except Exception as error:
    failed = is_out_of_memory(error) or repr(error)
gc.collect()
release_freed_memory()
run_probe(task, fits)
print(json.dumps([pairs, failed]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not count peaks")
def test_a_real_tasks_batches_take_what_is_predicted_and_no_more(tmp_path):
    command = [sys.executable, "-c", REAL, str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pairs, failed = json.loads(done.stdout.splitlines()[-1])
    shares = [predicted / measured for predicted, measured in pairs]
    assert min(measured for _, measured in pairs) > 20e6, "enough to be measured"
    assert min(shares) >= 1
    # in a model so small, products compiled for a new number of rows weigh more; the benchmark holds a real one to 15 %
    assert max(shares) <= 1.6
    assert failed is True
