"""A process that may not grow: a batch far beyond its memory is run in parts, and gives what the whole would give."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from tiny_run import save_tiny_models, save_tones
from transformers import LlamaConfig, LlamaForCausalLM

from ultravox.model import kernels

linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="RLIMIT_AS is not kept everywhere")

RUN = """
import gc, json, resource, sys
import torch
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from tiny_run import tiny_config
from ultravox.config.data import AugmentConfig
from ultravox.model.factory import build_model, build_processor
from ultravox.model.fast import use_fast_kernels
from ultravox.training.memory import keep_freed_memory, release_freed_memory
from ultravox.training.memory_probe import make_probe, peak_on_cpu, run_probe
from ultravox.training.speech import prepare_speech
from ultravox.training.splitting import run_with_splitting
from ultravox.training.tune import TuneTask

folder, limited = Path(sys.argv[2]), sys.argv[3] == "limited"
torch.manual_seed(0)
config = tiny_config((folder / "llm", folder / "whisper"), folder / "tones", folder / "run")
processor, model = build_processor(config.model), build_model(config.model)
use_fast_kernels(model)
task = TuneTask(model, processor, prepare_speech(config, model, processor), config.stages[1], 0)
task.stage.augment = AugmentConfig()  # drawn anew for each part
parameters = [p for group in task.parameter_groups() for p in group.parameters.values()]
task.train_mode()
keep_freed_memory()
fits = make_probe(task, [(150 + index, 60) for index in range(6)])
large = make_probe(task, [(140 + index, 60) for index in range(24)])
run_probe(task, fits)
allowed = peak_on_cpu(lambda: run_probe(task, fits)) + (64 << 20)
gc.collect()
release_freed_memory()
if limited:
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + allowed, -1))
splits, found = [], []

def loss_and_backward(part):
    output = task.loss(part)
    output.sum.backward()
    return output.sum.item(), output.count

for batch in (large, fits, large):  # training goes on
    parts = run_with_splitting(
        loss_and_backward, batch, task.halves, lambda whole, _: splits.append(len(whole.ids)), parameters=parameters
    )
    norm = sum(float(p.grad.double().square().sum()) for p in parameters) ** 0.5
    found.append([sum(loss for loss, _ in parts), sum(count for _, count in parts), norm])
    for parameter in parameters:
        parameter.grad = None
print(json.dumps([found, splits]))
"""


def outcome(folder, kind):
    command = [sys.executable, "-c", RUN, str(Path(__file__).parent), str(folder), kind]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@linux
def test_a_batch_of_four_times_the_limit_is_run_in_parts_and_training_goes_on(tmp_path):
    """Several times, since where memory runs out differs: in a tensor, in a compiled product, in a thread's stack."""
    models = save_tiny_models(tmp_path)
    larger = LlamaConfig.from_pretrained(models[0])
    larger.update({"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "head_dim": 64})
    LlamaForCausalLM(larger).save_pretrained(models[0])
    save_tones(tmp_path / "tones", 12)
    whole, splits = outcome(tmp_path, "free")
    assert not splits
    for _ in range(2):
        found, splits = outcome(tmp_path, "limited")
        assert splits.count(24) == 2, "both times the large one did not fit"
        for (loss, count, norm), (other_loss, other_count, other_norm) in zip(whole, found, strict=True):
            assert count == other_count
            assert other_loss == pytest.approx(loss, rel=1e-5)
            assert other_norm == pytest.approx(norm, rel=1e-3)


def test_what_one_thread_cannot_compile_another_does(monkeypatch):
    """In a fresh thread, without a gradient; what fails there too is raised here, and other errors at once."""
    x, weight = torch.ones(3, 4, requires_grad=True), torch.ones(2, 4)
    here = threading.get_ident()
    where = []

    def product(says="could not create a primitive", also_there=False):
        where.append(threading.get_ident())
        if where[-1] == here or also_there:
            raise RuntimeError(says)
        return x @ weight.T

    found = kernels._compiled(product)
    assert found.tolist() == [[4.0, 4.0]] * 3
    assert not found.requires_grad
    assert len(set(where)) == len(where) == 2
    with pytest.raises(RuntimeError, match="could not create a primitive"):
        kernels._compiled(lambda: product(also_there=True))
    where.clear()
    with pytest.raises(RuntimeError, match="a bug"):
        kernels._compiled(lambda: product("a bug"))
    assert where == [here]


NO_ROOM = """
import resource, torch
from ultravox.model.kernels import _in_fresh_thread
from ultravox.training.splitting import is_out_of_memory
torch.ones(300, 300) @ torch.ones(300, 300)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 20), -1))
try:
    _in_fresh_thread(lambda: torch.ones(1))
except Exception as error:
    print(is_out_of_memory(error), type(error).__name__)
"""


@linux
def test_no_room_for_a_thread_is_out_of_memory():
    done = subprocess.run([sys.executable, "-c", NO_ROOM], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "MemoryError"], done.stderr


BOUNDED = """
import os, torch
from ultravox.model.kernels import MAX_COMPILED, bound_compiled, matmul_transposed
bound_compiled()

def compiled_bytes():
    ends = [line.split()[0].split("-") for line in open("/proc/self/maps") if " rwxp " in line]
    return sum(int(end, 16) - int(start, 16) for start, end in ends)

sizes = []
for rows in range(1, 4 * MAX_COMPILED + 1):
    matmul_transposed(torch.ones(rows, 64), torch.ones(48, 64))
    sizes.append(compiled_bytes())
print(sizes[MAX_COMPILED - 1], sizes[-1])
"""


@linux
@pytest.mark.skipif(not kernels._HAS_ONEDNN, reason="nothing is compiled")
def test_no_more_than_so_many_compiled_products_are_kept():
    done = subprocess.run([sys.executable, "-c", BOUNDED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    full, later = map(int, done.stdout.split())
    assert 0 < later <= 1.2 * full


def test_a_choice_of_the_user_stays(monkeypatch):
    monkeypatch.setenv("DNNL_PRIMITIVE_CACHE_CAPACITY", "7")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    kernels.bound_compiled()
    assert "ONEDNN_PRIMITIVE_CACHE_CAPACITY" not in os.environ
