"""The loader: the plan's order whatever the number of ranks and workers, no random number drawn, no hang."""

import os
import signal
import time
from itertools import islice

import pytest
import torch

from ultravox.data.loader import Loader, killed_workers_explained
from ultravox.data.order import Position
from ultravox.errors import ConfigError, DataError


class Windows:
    """Epochs of windows of 3, 0 and 2 batches; a planned batch is its own place."""

    sizes = (3, 0, 2)

    def num_windows(self, epoch):
        return len(self.sizes)

    def num_batches(self, epoch, window):
        return self.sizes[window]

    def batch(self, epoch, window, index):
        return (epoch, window, index)


def with_pid(planned, position):
    assert planned == tuple(position)
    return (planned, os.getpid())


START = Position()


def taken(loader, steps, start=START):
    """The batches of each step, and the position after the last."""
    stream = loader.steps(start)
    found = list(islice(stream, steps))
    stream.close()
    return [[item.batch[0] for item in step.batches] for step in found], found[-1].after


EPOCH = [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 2, 0), (0, 2, 1)]
SEQUENCE = [(epoch, *place[1:]) for epoch in range(4) for place in EPOCH]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_the_plans_order_across_windows_and_epochs(workers):
    steps, after = taken(Loader(Windows(), with_pid, batches_per_step=2, workers=workers), 6)
    assert [place for step in steps for place in step] == SEQUENCE[:12]
    assert after == SEQUENCE[12]


def test_any_position_is_a_beginning():
    loader = Loader(Windows(), with_pid, batches_per_step=2)
    whole, _ = taken(loader, 6)
    _, after = taken(loader, 3)
    assert after == (1, 0, 1)
    assert taken(loader, 3, after)[0] == whole[3:]


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_share_each_step(workers):
    """Two ranks together compute the very steps that one would; the position after is the same on both."""
    alone, after = taken(Loader(Windows(), with_pid, batches_per_step=4), 4)
    shares = [
        taken(Loader(Windows(), with_pid, batches_per_step=4, rank=rank, world_size=2, workers=workers), 4)
        for rank in range(2)
    ]
    assert [share[1] for share in shares] == [after, after]
    for step, (even, odd) in zip(alone, zip(shares[0][0], shares[1][0], strict=True), strict=True):
        assert even == step[::2]
        assert odd == step[1::2]


def test_ranks_that_cannot_share_evenly_are_refused():
    with pytest.raises(ConfigError, match=r"4 batches per step cannot be dealt to 3 processes.*multiple of 3"):
        Loader(Windows(), with_pid, batches_per_step=4, world_size=3)


def test_workers_are_processes_and_draw_no_random_number_of_the_run():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    stream = Loader(Windows(), with_pid, workers=2).steps(Position())
    found = [item for step in islice(stream, 6) for item in step.batches]
    stream.close()
    assert {item.worker for item in found} == {1, 2}
    assert os.getpid() not in {item.batch[1] for item in found}
    assert torch.equal(torch.get_rng_state(), before)


def fails_at_two(planned, position):
    if planned[2] == 2:
        raise DataError("row 7 is bad")
    return planned


@pytest.mark.parametrize("workers", [0, 2])
def test_a_users_error_comes_as_it_is(workers):
    stream = Loader(Windows(), fails_at_two, workers=workers).steps(Position())
    next(stream)
    next(stream)
    with pytest.raises(DataError, match=r"^row 7 is bad$"):
        next(stream)


def dies_at_two(planned, position):
    if planned[2] == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return planned


def test_a_worker_that_is_killed_for_memory_ends_the_run_with_a_reason():
    stream = Loader(Windows(), dies_at_two, workers=1).steps(Position())
    with pytest.raises(DataError, match=r"killed.*data\.loader\.workers"):
        list(islice(stream, 6))


def test_data_without_a_batch_is_an_error_and_no_endless_search():
    class Empty(Windows):
        sizes = (0, 0)

    with pytest.raises(DataError, match="no batch"):
        next(Loader(Empty(), with_pid).steps(Position()))


def test_batches_are_made_while_the_step_computes():
    made = []

    def remember(planned, position):
        made.append(planned)
        return planned

    stream = Loader(Windows(), remember, prefetch=2).steps(Position())
    next(stream)
    for _ in range(200):
        if len(made) >= 3:
            break
        time.sleep(0.01)
    stream.close()
    assert made == SEQUENCE[:3]


class Pinnable:
    """A batch that knows how to go to pinned memory."""

    def __init__(self, planned, pinned=False):
        self.planned, self.pinned = planned, pinned

    def pin_memory(self):
        return Pinnable(self.planned, True)


@pytest.mark.parametrize("pin_memory", [False, True])
def test_batches_are_pinned_where_it_is_asked_for(pin_memory):
    """PyTorch's own pinning needs a GPU, and asks each item for this method."""
    stream = Loader(Windows(), lambda planned, position: Pinnable(planned), pin_memory=pin_memory).steps(Position())
    (loaded,) = next(stream).batches
    stream.close()
    assert (loaded.batch.pinned, loaded.batch.planned, loaded.position) == (pin_memory, (0, 0, 0), (0, 0, 0))
    assert loaded.pin_memory().batch.pinned


def test_the_loaders_thread_starts_no_threads_beside_the_steps_own():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        stream = Loader(Windows(), lambda planned, position: torch.get_num_threads()).steps(Position())
        (loaded,) = next(stream).batches
        stream.close()
        assert loaded.batch == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_killed_worker_is_told_also_where_what_it_interrupted_says_something_else():
    def interrupted():
        try:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
        except RuntimeError:
            raise TypeError("not the type that was expected")  # noqa: B904 - as a library would

    with pytest.raises(DataError, match=r"was killed \(DataLoader worker \(pid 7\)"), killed_workers_explained():
        interrupted()
    with pytest.raises(TypeError, match="ours"), killed_workers_explained():
        raise TypeError("ours")
