"""A process that is killed where a test says."""

import os
import signal
from collections.abc import Callable
from typing import Any


def kill_in_call(
    owner: Any, attribute: str, call: int, *, after: bool, counts: Callable[..., bool] = lambda *args, **kwargs: True
) -> None:
    """From here on, this process is killed in, or after, one of the calls that count; the first of them is 1."""
    real, calls = getattr(owner, attribute), 0

    def die(*args, **kwargs):
        nonlocal calls
        if not counts(*args, **kwargs):
            return real(*args, **kwargs)
        calls += 1
        if calls == call and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, attribute, die)
