"""Who builds the shards: this process, several of them, or Ray. The reports come in the tasks' order.

Tasks are taken from their iterator as they are needed, a few more than there are workers, so that memory does not grow
with the corpus.
"""

import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from ultravox.data.shard import ShardReport, ShardTask, build_shard
from ultravox.errors import DataError

RAY_STORE_BYTES = 100 << 20  # tasks and reports only: the audio goes from file to file

Work = ShardTask | ShardReport
"""A shard to build, or the report of one that is there already."""
Reports = Generator[ShardReport, None, None]


def run_local(tasks: Iterable[Work], workers: int) -> Reports:
    """Build shards in this process, or in several when `workers` is above 1.

    Errors: DataError when a worker is killed; a shard that it was building is not there, or is there whole.
    """
    if workers == 1:
        for task in tasks:
            yield build_shard(task) if isinstance(task, ShardTask) else task
        return
    # spawned, not forked: a fork would hold this process's lock and threads' locks
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        try:
            yield from _in_order(tasks, workers, lambda task: pool.submit(build_shard, task), Future.result)
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process was killed, perhaps for want of memory: run the same command again, it goes on with "
                "what is missing; fewer --workers need less memory"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def run_ray(tasks: Iterable[Work], workers: int) -> Reports:
    """Build shards by Ray: on the cluster that ``RAY_ADDRESS`` names, whose machines must share the file system with
    this one, or on this machine with so many workers.

    Errors: DataError when Ray is not installed; what building a shard raises.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise DataError("--engine ray needs Ray, which is not installed: pip install 'ultravox[ray]'") from error
    ours = not ray.is_initialized()
    if ours:
        here: dict[str, Any] = {"num_cpus": workers, "object_store_memory": RAY_STORE_BYTES, "include_dashboard": False}
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **({} if os.environ.get("RAY_ADDRESS") else here))
    try:
        remote = ray.remote(num_cpus=1)(build_shard)
        yield from _in_order(tasks, workers, remote.remote, ray.get)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    finally:
        if ours:
            ray.shutdown()


ENGINES: dict[str, Callable[[Iterable[Work], int], Reports]] = {"local": run_local, "ray": run_ray}


def _in_order(
    tasks: Iterable[Work], workers: int, submit: Callable[[ShardTask], Any], result: Callable[[Any], ShardReport]
) -> Reports:
    """Reports in the tasks' order, with as many tasks under way as keep the workers busy."""
    pending: deque[Any] = deque()

    def first() -> ShardReport:
        done = pending.popleft()
        return done if isinstance(done, ShardReport) else result(done)

    for task in tasks:
        pending.append(submit(task) if isinstance(task, ShardTask) else task)
        if len(pending) > 2 * workers:
            yield first()
    while pending:
        yield first()


def _end_with_parent() -> None:
    """A worker whose parent is killed would wait for work for ever; and Ctrl-C ends it without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
