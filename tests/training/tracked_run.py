"""A process that trains under trackers, which keep state of their own: `python tracked_run.py CONFIG first|second`.

The first is stopped by Ctrl-C in the middle of `tune`; the second goes on, with a token from a key vault.
"""

import os
import signal
import sys
from types import SimpleNamespace

STOP_AT = 7
"""Batches of `tune`, two of which are a step."""


def stop_in_tune() -> None:
    """Send this process what Ctrl-C sends."""
    from ultravox.training.tune import TuneTask

    inner, calls = TuneTask.loss, []

    def loss(self, batch):
        calls.append(batch)
        if len(calls) == STOP_AT:
            os.kill(os.getpid(), signal.SIGINT)
        return inner(self, batch)

    TuneTask.loss = loss


def fake_vault() -> None:
    """A vault that answers from the environment of this test."""
    from ultravox.auth import vault

    token = os.environ.pop("TOKEN_OF_THE_VAULT")
    vault.make_client = lambda url: SimpleNamespace(get_secret=lambda name: SimpleNamespace(value=token))


if __name__ == "__main__":
    from ultravox.cli.main import main

    path, part = sys.argv[1:]
    if part == "first":
        stop_in_tune()
        code = main(["train", path])
    else:
        fake_vault()
        code = main(["train", path, "--resume"])
    assert "HF_TOKEN" not in os.environ, "what was found is put into the environment for the run alone"
    sys.exit(code)
