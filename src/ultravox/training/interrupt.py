"""Ctrl-C, SIGTERM, SIGUSR1 and too much memory end training after the step in hand, with a checkpoint."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

#: Ctrl-C (exit code 130), a cluster that ends a job (143), and one that warns of it (138).
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

#: Of a run that ended because of its memory: `EX_TEMPFAIL` of sysexits.h, "try again later".
MEMORY_EXIT_CODE = 75

#: Why a run is to end: the number of a signal, or which memory is above its bound, in words.
Reason = int | str


class TrainingInterrupted(Exception):
    """Training stopped, after saving; the exit code is 128 + the signal (see `SIGNALS`) or `MEMORY_EXIT_CODE`."""

    def __init__(self, reason: Reason) -> None:
        by = f"because {reason}" if isinstance(reason, str) else f"by {signal.Signals(reason).name}"
        super().__init__(f"stopped {by}; a checkpoint was saved, go on with --resume")
        self.exit_code = MEMORY_EXIT_CODE if isinstance(reason, str) else 128 + reason


class StopRequest:
    """Set by the first signal, or by memory above its bound."""

    def __init__(self, excess: Callable[[], str | None] = lambda: None) -> None:
        """Args:
        excess: which memory is above its bound now, in words; None = none.
        """
        self.reason: Reason | None = None
        self._excess, self._count = excess, 0

    def look(self) -> Reason | None:
        """The reason to stop, if there is one by now."""
        self.reason = self.reason or self._excess()
        return self.reason

    def handle(self, signal_number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or signal_number
        self._count += 1
        if self._count >= 3 and signal_number == signal.SIGINT:
            raise KeyboardInterrupt  # the third Ctrl-C no longer waits for the step


@contextmanager
def stop_on_signals(excess: Callable[[], str | None] = lambda: None) -> Iterator[StopRequest]:
    """Catch `SIGNALS` while the block runs; outside the main thread none. `excess`: see `StopRequest`."""
    request = StopRequest(excess)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.signal(number, request.handle) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
