"""Ctrl-C, SIGTERM and SIGUSR1 end training after the step in hand, with a checkpoint."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

#: Ctrl-C (exit code 130), a cluster that ends a job (143), and one that warns of it (138).
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class TrainingInterrupted(Exception):
    """Training stopped on a signal, after saving; the exit code is 128 + the signal: see `SIGNALS`."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signal_number).name}; a checkpoint was saved, go on with --resume"
        )
        self.exit_code = 128 + signal_number


class StopRequest:
    """Set by the first signal."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._count = 0

    def __bool__(self) -> bool:
        return self.signal_number is not None

    def handle(self, signal_number: int, frame: FrameType | None) -> None:
        self.signal_number = self.signal_number or signal_number
        self._count += 1
        if self._count >= 3 and signal_number == signal.SIGINT:
            raise KeyboardInterrupt  # the third Ctrl-C no longer waits for the step


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Catch `SIGNALS` while the block runs. Outside the main thread: do nothing."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.signal(number, request.handle) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
