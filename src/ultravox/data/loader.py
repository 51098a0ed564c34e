"""From the plan to the step: batches are made ahead, by worker processes or by a thread, in the plan's order.

The sequence of micro-batches is one for the whole run. A step takes the next few of it, and each rank makes its share
of them, so neither the number of ranks nor that of workers changes which example is in which step. All the state there
is: the position of the next step, three integers.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from ultravox.data.order import Position, rank_slice
from ultravox.errors import DataError, UltravoxError

JOBS_AHEAD = 64

T = TypeVar("T")


class Order(Protocol):
    """What a loader asks of a plan, in its order. `DataOrder` is one, `StreamOrder` another."""

    def num_windows(self, epoch: int) -> int: ...

    def num_batches(self, epoch: int, window: int) -> int: ...

    def batch(self, epoch: int, window: int, index: int) -> Any: ...


@dataclass(frozen=True, slots=True)
class Loaded:
    """One micro-batch, and how it came."""

    batch: Any
    position: Position
    index: int
    """Among the micro-batches of its step, over all ranks."""
    after: Position
    """Where the next step begins."""
    worker: int
    """The process that made it; 0 = none but the step's own."""

    def pin_memory(self) -> "Loaded":
        """The same with its tensors in pinned memory, if the batch knows how; PyTorch's loader asks for it so too."""
        pin = getattr(self.batch, "pin_memory", None)
        return self if pin is None else replace(self, batch=pin())


@dataclass(frozen=True, slots=True)
class LoadedStep:
    """What one rank computes in one step."""

    batches: list[Loaded]
    after: Position


@dataclass(frozen=True, slots=True)
class Job:
    """One micro-batch to make."""

    planned: Any
    position: Position
    index: int
    after: Position


class Loader:
    """Batches of one rank, step by step, from any position."""

    def __init__(
        self,
        order: Order,
        make: Callable[[Any, Position], Any],
        *,
        batches_per_step: int = 1,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool = False,
    ) -> None:
        """Args:
        order: the plan.
        make: planned batch and its position → what the step gets; a pure function of them, so that resuming repeats it.
        batches_per_step: micro-batches of one step, over all ranks.
        rank, world_size: whose share.
        workers: processes that make batches; 0 = a thread of this process.
        prefetch: batches made ahead, by each worker.
        pin_memory: whether tensors go to pinned memory, from where they travel faster to a GPU.

        Raises:
            ConfigError: the ranks cannot share a step evenly.
        """
        self.mine = rank_slice(0, batches_per_step, rank, world_size)
        """Which micro-batches of each step are this rank's."""
        self.order, self.make = order, make
        self.batches_per_step = batches_per_step
        self.workers, self.prefetch, self.pin_memory = workers, prefetch, pin_memory

    def steps(self, start: Position) -> Iterator[LoadedStep]:
        """The endless steps from a position on. Close the iterator to end its threads and workers."""
        jobs = self._jobs(start)
        with ExitStack() as stack:
            if self.workers:
                # Ahead of the workers too: to plan the next window takes seconds where the corpus is large.
                made = self._by_workers(stack.enter_context(closing(_ahead(jobs, JOBS_AHEAD))))
            else:
                made = _ahead(map(_Making(self.make, self.pin_memory), jobs), self.prefetch)
            stack.enter_context(closing(made))
            while True:
                batches = [_checked(next(made)) for _ in self.mine]
                yield LoadedStep(batches, batches[-1].after)

    def _jobs(self, start: Position) -> Iterator[Job]:
        """This rank's share. The plan is made here, once, and not by each worker; it is never asked to go back."""
        positions = self._sequence(start)
        upcoming = next(positions)
        while True:
            step = []
            for index in range(self.batches_per_step):
                if index in self.mine:
                    step.append((self.order.batch(*upcoming), upcoming, index))
                upcoming = next(positions)
            for planned, position, index in step:
                yield Job(planned, position, index, upcoming)

    def _sequence(self, start: Position) -> Iterator[Position]:
        """Every position from one on; an epoch without a batch is an error, or the search would have no end."""
        epoch, window, batch = start
        while True:
            found = (window, batch) != (0, 0)
            for w in range(window, self.order.num_windows(epoch)):
                for b in range(batch, self.order.num_batches(epoch, w)):
                    yield Position(epoch, w, b)
                    found = True
                batch = 0
            if not found:
                raise DataError(f"epoch {epoch} of the data has no batch: check data.sources")
            epoch, window, batch = epoch + 1, 0, 0

    def _by_workers(self, jobs: Iterator[Job]) -> "Generator[Loaded | UltravoxError]":
        import torch
        from torch.utils.data import DataLoader

        loader: DataLoader[Any] = DataLoader(
            _Making(self.make),  # type: ignore[arg-type]
            sampler=jobs,  # type: ignore[arg-type]
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=self.prefetch,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # else it draws from the run's own random numbers
        )
        with killed_workers_explained():
            yield from loader


@contextmanager
def killed_workers_explained() -> Iterator[None]:
    """Turn PyTorch's error for a worker that was killed into a DataError that says what to do.

    PyTorch raises it from a signal handler, so also while the step computes: around that too it must stand. What is
    interrupted there may turn it into an error of its own.
    """
    try:
        yield
    except Exception as error:
        if (killed := _of_killed_worker(error)) is None:
            raise
        raise DataError(
            f"a process that makes batches was killed ({killed}): if the machine has run out of memory, "
            "lower data.loader.workers or data.loader.prefetch"
        ) from error


def _of_killed_worker(error: BaseException | None) -> RuntimeError | None:
    """PyTorch's error among an error and those that it was raised from or during."""
    while error is not None:
        if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
            return error
        error = error.__cause__ or error.__context__
    return None


def _checked(loaded: "Loaded | UltravoxError") -> Loaded:
    if isinstance(loaded, UltravoxError):
        raise loaded
    return loaded


def _ahead(items: Iterator[T], count: int) -> Generator[T]:
    """The same items, made up to `count` ahead by a thread."""
    pool = ThreadPoolExecutor(1, "batches", initializer=_compute_alone)
    try:
        ahead: deque[Future[T]] = deque(pool.submit(next, items) for _ in range(count))
        while True:
            ready = ahead.popleft().result()
            ahead.append(pool.submit(next, items))
            yield ready
    finally:
        pool.shutdown(cancel_futures=True)


def _compute_alone() -> None:
    """Keep PyTorch from starting threads for this one.

    A second team of OpenMP threads beside the step's own makes more than there are processors, and then the step's team
    goes to sleep between any two of its products: a quarter of the speed of tuning on two cores.
    """
    import torch

    torch.set_num_threads(1)  # of the calling thread, and of those that begin later; the step's own keeps its number


class _Making:
    """The plan's jobs made into batches: a function for the thread, a dataset for PyTorch's workers."""

    def __init__(self, make: Callable[[Any, Position], Any], pin_memory: bool = False) -> None:
        self.make, self.pin_memory = make, pin_memory

    def __call__(self, job: Job) -> "Loaded | UltravoxError":
        """The batch; or the user's error as it is, where PyTorch would wrap it into a traceback."""
        from torch.utils.data import get_worker_info

        info = get_worker_info()
        worker = 0 if info is None else 1 + info.id
        try:
            batch = self.make(job.planned, job.position)
        except UltravoxError as error:
            return error
        loaded = Loaded(batch, job.position, job.index, job.after, worker)
        return loaded.pin_memory() if self.pin_memory else loaded

    __getitem__ = __call__
