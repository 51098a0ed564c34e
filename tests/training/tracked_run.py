"""Runs under trackers; and a process of its own for them, since they keep state: `tracked_run.py CONFIG first|second`.

The first is stopped by Ctrl-C in the middle of `tune`; the second goes on, with a token from a key vault.
"""

import importlib.util
import json
import os
import signal
import sys
from types import SimpleNamespace

import pytest
from tiny_run import tiny_config

STOP_AT = 7
"""Batches of `tune`, two of which are a step."""


def short_config(parts, run_dir, **logging):
    """4 steps of `align` and 6 of `tune`."""
    content = tiny_config(*parts, run_dir).model_dump(mode="json")
    for stage, steps in zip(content["stages"], (4, 6), strict=True):
        stage["max_steps"] = steps
        stage["optim"]["warmup_steps"] = 2
    content["logging"] |= logging
    return type(tiny_config(*parts, run_dir)).model_validate(content)


def require_trackers(*names):
    """In CI all of them are installed, and whatever is missing fails the test."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing and not os.environ.get("CI"):
        pytest.skip(f"not installed: {', '.join(missing)}")
    assert not missing


def logged(run_dir):
    """`<stage>/<step>` → loss, of log.jsonl."""
    rows = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return {f"{row['stage']}/{row['step']}": row["loss"] for row in rows if "loss" in row}


def watch_tune(stop: bool) -> None:
    """See that the token is where libraries look; `stop`: send this process what Ctrl-C sends."""
    from ultravox.training.tune import TuneTask

    inner, calls = TuneTask.loss, []

    def loss(self, batch):
        calls.append(batch)
        print("token", os.environ["HF_TOKEN"][3:8])
        if stop and len(calls) == STOP_AT:
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
    watch_tune(stop=part == "first")
    if part == "first":
        code = main(["train", path])
    else:
        fake_vault()
        code = main(["train", path, "--resume"])
    assert "HF_TOKEN" not in os.environ, "what was found is put into the environment for the run alone"
    sys.exit(code)
