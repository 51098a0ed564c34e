"""Out of memory is recognised, and the halves of a batch give what the whole gives."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_run import tiny_config
from torch import nn

from ultravox.data.order import PlannedBatch
from ultravox.errors import DataError
from ultravox.model.factory import build_model, build_processor
from ultravox.training.batches import SpeechBatch
from ultravox.training.speech import prepare_speech
from ultravox.training.speech_task import BEGINNING
from ultravox.training.splitting import is_out_of_memory, run_with_splitting
from ultravox.training.stage import TASKS


def raised_by(function):
    with pytest.raises(Exception) as caught:  # noqa: PT011 - whichever it is, is the question
        function()
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        raised_by(lambda: torch.empty(1 << 55)),
        raised_by(lambda: np.empty(1 << 55)),
        raised_by(lambda: bytearray(1 << 60)),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("could not create a primitive"),
        OSError(12, "Cannot allocate memory"),
    ],
    ids=lambda error: f"{type(error).__name__} {str(error)[:20]}",
)
def test_out_of_memory_is_recognised(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        raised_by(lambda: torch.ones(2) @ torch.ones(3)),
        ValueError("out of memory"),
        OSError(28, "No space left on device"),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_are_not_taken_for_it(error):
    assert not is_out_of_memory(error)


class _Fails(torch.autograd.Function):
    """The identity, whose backward pass runs out of memory."""

    @staticmethod
    def forward(ctx, x, fails):
        ctx.fails = fails
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if ctx.fails:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return gradient, None


class Toy:
    """Two layers; batches above `most` rows fail between the second layer's gradient and the first one's."""

    def __init__(self, most, error=None):
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 8).double(), nn.Linear(8, 1).double()
        self.parameters = [*self.first.parameters(), *self.second.parameters()]
        self.most, self.error, self.attempts = most, error, []

    def loss_and_backward(self, batch):
        self.attempts.append(batch.ids)
        hidden = _Fails.apply(self.first(batch.x).tanh(), len(batch.ids) > self.most)
        loss = self.second(hidden).square().sum()
        loss.backward()
        if self.error is not None:
            raise self.error
        return loss.item(), len(batch.ids)

    def gradients(self):
        return [parameter.grad.clone() for parameter in self.parameters]


def toy_batch(count, seed=1):
    x = torch.randn(count, 4, dtype=torch.double, generator=torch.Generator().manual_seed(seed))
    return SimpleNamespace(ids=[f"example {index}" for index in range(count)], x=x)


def cut(batch):
    middle = len(batch.ids) // 2
    return [SimpleNamespace(ids=batch.ids[s], x=batch.x[s]) for s in (slice(middle), slice(middle, None))]


def run(toy, batch, splits=None):
    on_split = lambda whole, parts: splits.append([len(part.ids) for part in parts])  # noqa: E731
    return run_with_splitting(
        toy.loss_and_backward,
        batch,
        cut,
        on_split if splits is not None else lambda *_: None,
        parameters=toy.parameters,
    )


@pytest.mark.parametrize("most", [2, 6])
@pytest.mark.parametrize("accumulated", [False, True])
def test_parts_give_the_loss_the_count_and_the_gradients_of_the_whole(most, accumulated):
    """Also where gradients of an earlier batch are there already, and the second layer's come before it fails."""
    whole, split = Toy(most=100), Toy(most=most)
    splits = []
    results = []
    for toy in (whole, split):
        if accumulated:
            run(toy, toy_batch(1, seed=9))
        results.append(run(toy, toy_batch(11), splits))
    assert len(results[0]) == 1
    assert len(results[1]) > 1
    assert sum(count for _, count in results[1]) == 11
    assert sum(loss for loss, _ in results[1]) == pytest.approx(results[0][0][0], rel=1e-12)
    for one, other in zip(whole.gradients(), split.gradients(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert splits[0] == [5, 6]
    done = [name for ids in split.attempts[accumulated:] if len(ids) <= most for name in ids]
    assert done == toy_batch(11).ids, "each once, in their order"


def test_without_a_split_the_bits_are_those_of_adding_in_place():
    one, other = Toy(most=100), Toy(most=100)
    for seed in range(3):
        one.loss_and_backward(toy_batch(5, seed))
        run(other, toy_batch(5, seed))
    assert all(torch.equal(a, b) for a, b in zip(one.gradients(), other.gradients(), strict=True))


def test_an_example_that_does_not_fit_alone_is_named():
    toy = Toy(most=100)
    run(toy, toy_batch(2))
    before = toy.gradients()
    toy.most = 0
    with pytest.raises(DataError, match=r"example 0 alone does not fit .* data\.max_audio_seconds"):
        run(toy, toy_batch(4))
    assert all(torch.equal(a, b) for a, b in zip(toy.gradients(), before, strict=True))


def test_another_error_goes_through_and_leaves_the_gradients_alone():
    toy = Toy(most=100)
    run(toy, toy_batch(2))
    before = toy.gradients()
    toy.error = ValueError("a bug")
    with pytest.raises(ValueError, match="a bug"):
        run(toy, toy_batch(4))
    assert all(torch.equal(a, b) for a, b in zip(toy.gradients(), before, strict=True))


def test_a_failed_attempt_leaves_no_graph_behind():
    """What the first attempt held is free when its halves run."""
    alive = []

    class Held(Toy):
        def loss_and_backward(self, batch):
            alive.append(sum(reference() is not None for reference in references))
            tensor = torch.zeros(10)
            references.append(weakref.ref(tensor))
            return super().loss_and_backward(batch)

    import weakref

    references = []
    run(Held(most=3), toy_batch(11))
    assert len(alive) > 3
    assert set(alive) == {0}


@pytest.mark.parametrize("objective", ["align", "tune"])
def test_halves_of_a_real_batch_give_what_the_whole_gives(parts, tmp_path, objective):
    models, tones = parts
    config = tiny_config(models, tones, tmp_path / "run")
    (stage,) = [stage for stage in config.stages if stage.objective == objective]
    stage.augment = type(stage.augment)()  # drawn anew for each half
    if objective == "align":
        stage.align.match_weight = 0  # a mean over the batch's positions: the one term that is no sum over examples
    model, processor = build_model(config.model), build_processor(config.model)
    task = TASKS[objective](model, processor, prepare_speech(config, model, processor), stage, 0)
    parameters = [p for group in task.parameter_groups() for p in group.parameters.values()]
    task.train_mode()
    none = np.zeros(7, dtype=int)
    batch = task.make_batch(PlannedBatch(np.arange(7), np.arange(7) % 2, prompts=none, copies=none), BEGINNING)
    found = []
    for most in (7, 2):

        def loss_and_backward(part, most=most):
            output = task.loss(part)
            output.sum.backward()
            if len(part.ids) > most:
                raise MemoryError
            return output.sum.item(), output.count, output.num_tokens, output.audio_seconds

        splits = []
        outputs = run_with_splitting(
            loss_and_backward, batch, task.halves, lambda whole, _, s=splits: s.append(whole.ids), parameters=parameters
        )
        gradients = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        found.append((np.sum(outputs, axis=0), gradients, len(outputs), splits))
    (whole, whole_gradients, *_), (summed, gradients, num_parts, splits) = found
    assert num_parts == 4
    assert [len(ids) for ids in splits] == [7, 3, 4]
    np.testing.assert_allclose(summed, whole, rtol=1e-6)
    for one, other in zip(whole_gradients, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * float(one.abs().max() + 1))


def test_halves_keep_the_windows_of_each_row_and_drop_padding():
    """Rows of two windows, of one, of none (text alone) and of one."""
    numbers = [np.array([number]) for number in range(4)]
    batch = SpeechBatch(
        ids=["a", "b", "c", "d"],
        uids=["A", "B", "C", "D"],
        sources=[0, 1, 2, 3],
        input_ids=numbers,
        supervised=numbers,
        transcripts=numbers,
        audio_tokens=[[5], [2], [], [3]],
        num_windows=[2, 1, 0, 1],
        values=torch.arange(4 * 9).view(4, 9, 1).float(),
        lengths=torch.tensor([9, 3, 4, 5]),
        encoded=True,
        seconds=[4.0, 1.0, 0.0, 2.0],
        faults=[("damaged", "e")],
        epoch=3,
        augment_seed=("s",),
    )
    first, second = batch.halves()
    for name in ("ids", "uids", "sources", "input_ids", "supervised", "transcripts", "audio_tokens", "num_windows"):
        assert getattr(first, name) + getattr(second, name) == getattr(batch, name), name
    assert (first.ids, second.ids) == (["a", "b"], ["c", "d"])
    assert first.lengths.tolist() == [9, 3, 4]
    assert second.lengths.tolist() == [5]
    torch.testing.assert_close(first.values, batch.values[:3])
    torch.testing.assert_close(second.values, batch.values[3:, :5])
    assert first.audio_seconds == 5.0
    assert second.audio_seconds == 2.0
    assert first.faults == second.faults == [], "they are counted once, before the split"
    assert {(part.encoded, part.epoch) for part in (first, second)} == {(True, 3)}
    assert first.augment_seed != second.augment_seed
    text_alone, _ = second.halves()
    assert (text_alone.ids, len(text_alone.values), text_alone.audio_seconds) == (["c"], 0, 0.0)
