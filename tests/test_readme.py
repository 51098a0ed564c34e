"""Every command of the README is run, on a run that is short: the same recipe, a few clips and a few steps."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ultravox.data.sources import load_clips

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()

SHORT = """
extends: {quickstart}
data:
  sources:
    - {{name: asterisk-en, task: transcription, max_clips: 30}}
    - {{name: spoken-requests-en, task: answer, max_clips: 8}}
stages:
  - {{name: align, max_steps: 4, evaluate_every: 0, log_every: 1, optim: {{warmup_steps: 1}}}}
  - {{name: tune, max_steps: 2, max_batch_tokens: 500, evaluate_every: 0, log_every: 1, optim: {{warmup_steps: 1}}}}
evaluation: {{num_progress_clips: 2, max_new_tokens: 8, num_bootstrap: 50}}
"""


LONGER_STEPS = 6
"""In the place of the README's 500: Ctrl-C must find the time to come in between."""


def blocks(language: str) -> list[str]:
    """The README's code blocks in one language."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def readme_commands() -> list[str]:
    """Each line of each shell block, and each command in the text."""
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    return lines + re.findall(r"`(\.venv/bin/[^`]+)`", re.sub(r"```.*?```", "", README, flags=re.DOTALL))


def quickstart_commands() -> list[str]:
    """What `make quickstart` would run, its set-up left out: this environment is set up already."""
    done = subprocess.run(["make", "-n", "quickstart"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [line.strip() for line in done.stdout.splitlines() if "/ultravox " in line]


class Shortened:
    """Runs commands with the quickstart's config, run folder and environment replaced by short ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "short.yaml").write_text(SHORT.format(quickstart=ROOT / "configs" / "quickstart.yaml"))

    def run(self, command: str, **options) -> subprocess.CompletedProcess:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        words = self.words(command)
        return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, **options)

    def words(self, command: str) -> list[str]:
        words = [self._replace(word) for word in shlex.split(command) if word]
        if "evaluate" in words:  # a part would not go into the run folder by itself
            words += ["--limit", "3", "--output", words[2]]
        if "benchmarks/readme.py" in words:  # into a copy: the repository's own numbers are not those of a short run
            shutil.copy(ROOT / "README.md", self.folder)
            words += ["--readme", str(self.folder / "README.md"), "--kept", str(self.folder / "kept")]
            words += ["--allow-partial"]
        if "train" in words and "--run_dir" not in words:
            words += ["--run_dir", str(self.folder / Path(words[2]).stem.replace("short", "quickstart"))]
        return words

    def _replace(self, word: str) -> str:
        if word.endswith("/ultravox"):
            return str(Path(sys.executable).with_name("ultravox"))
        if word.endswith("/python"):
            return sys.executable
        if word == "configs/quickstart.yaml":
            return str(self.folder / "short.yaml")
        if word == "own.yaml":
            return str(self.folder / word)
        if word.startswith("runs/"):
            return str(self.folder / word.removeprefix("runs/"))
        return {"500": str(LONGER_STEPS)}.get(word, word)


@pytest.fixture(scope="module")
def shortened(tmp_path_factory) -> Shortened:
    """After the quickstart's own commands, each of which succeeded."""
    short = Shortened(tmp_path_factory.mktemp("readme"))
    commands = quickstart_commands()
    assert [shlex.split(command)[1] for command in commands] == ["models", "data", "train", "evaluate", "ask"]
    for command in commands:
        done = short.run(command)
        assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
        assert "ask" not in shlex.split(command) or done.stdout.endswith("\n")
    return short


def test_the_quickstart_leaves_what_the_readme_says(shortened: Shortened):
    run = shortened.folder / "quickstart"
    results = json.loads((run / "results.json").read_text())
    assert results["wer"]["n"] == 3
    assert results["controls"]["silence"]["wer"] >= 0
    assert results["controls"]["swapped"]["wer"] >= 0
    assert results["bounds"]["cascade"]["wer"] < 0.5, "Whisper's own decoder hears these clips"
    assert results["bounds"]["text"]["wer"] >= 0
    assert results["train_seconds"] > 0
    assert results["peak_memory_bytes"] > 1e8
    assert "<audio" in (run / "report.html").read_text()


def test_there_are_commands():
    assert "make quickstart" in readme_commands()
    assert "make test" in readme_commands()
    assert {"make lint", "make test"} <= set((ROOT / ".ci" / "run").read_text().splitlines()), "CI runs these two whole"


def stands_alone(command: str) -> bool:
    """The others depend on those before them, or on a person: each has a test below."""
    return ".venv/bin/" in command and not re.search(r"\bchat\b|runs/mine|runs/own|own\.yaml", command)


@pytest.mark.parametrize("command", list(filter(stands_alone, readme_commands())))
def test_command(command: str, shortened: Shortened):
    done = shortened.run(command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout or "train" in command or "benchmarks" in command


def test_ctrl_c_and_resume(shortened: Shortened):
    """The block's commands in its order, with Ctrl-C in the first, of which the text under it speaks."""
    train, resume, evaluate = [command for command in readme_commands() if "runs/mine" in command]
    assert resume == f"{train} --resume"
    run = shortened.folder / "mine"
    log = run / "log.jsonl"
    with (shortened.folder / "stderr").open("w+") as errors:
        process = subprocess.Popen(shortened.words(train), cwd=ROOT, stderr=errors)
        try:
            deadline = time.monotonic() + 300
            while not (log.is_file() and '"tune"' in log.read_text()):
                assert process.poll() is None, "it ended before its second stage"
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=300) == 130
        finally:
            process.kill()
        errors.seek(0)
        assert "a checkpoint was saved, go on with --resume" in errors.read()
    before = [json.loads(line) for line in log.read_text().splitlines()]
    assert 1 <= before[-1]["step"] < LONGER_STEPS
    assert not (run / "model").exists()
    done = shortened.run(resume)
    assert done.returncode == 0, done.stderr[-3000:]
    after = [json.loads(line) for line in log.read_text().splitlines()]
    assert after[: len(before)] == before, "what was trained before Ctrl-C was trained again"
    steps = [(row["stage"], row["step"]) for row in after if "loss" in row]
    assert steps == [("align", step) for step in range(1, 5)] + [("tune", step) for step in range(1, LONGER_STEPS + 1)]
    done = shortened.run(evaluate)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((run / "results.json").read_text())["wer"]["n"] == 3


def test_own_recordings(shortened: Shortened):
    """Files of the form that the README shows, and its config for them."""
    my = shortened.folder / "my"
    (my / "wav").mkdir(parents=True)
    (row,) = [json.loads(block) for block in blocks("json")]
    for split, count in (("train", 20), ("heldout", 4)):
        lines = []
        for clip in load_clips("asterisk-en", split)[:count]:
            audio = f"wav/{clip.id}{clip.audio.suffix}"
            shutil.copy(clip.audio, my / audio)
            mine = {**row, "id": clip.id, "audio": audio, "text": clip.text, "duration": clip.duration}
            if len(lines) % 2:
                del mine["duration"]
            lines.append(json.dumps(mine) + "\n")
        (my / f"{split}.jsonl").write_text("".join(lines))
    (config,) = blocks("yaml")
    config = config.replace("configs/quickstart.yaml", str(shortened.folder / "short.yaml"))
    (shortened.folder / "own.yaml").write_text(config.replace("my/", f"{my}/"))
    commands = [command for command in readme_commands() if "own" in command]
    assert len(commands) == 2
    for command in commands:
        done = shortened.run(command)
        assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((shortened.folder / "own" / "results.json").read_text())
    assert (results["data"]["split_clips"], results["answers"]["share"]) == (4, None)
    assert json.loads((shortened.folder / "own" / "train.json").read_text())["num_clips"] == 18  # and two for progress


def test_the_numbers_are_made_from_the_run(shortened: Shortened):
    done = shortened.run(".venv/bin/python benchmarks/readme.py runs/quickstart")
    assert done.returncode == 0, done.stderr[-3000:]
    wer = json.loads((shortened.folder / "quickstart" / "results.json").read_text())["wer"]
    written = (shortened.folder / "README.md").read_text()
    assert f"Held out: 3 clips, {wer['num_words']} words" in written
    assert f"| **Word error rate**, held-out human speech | **{100 * wer['value']:.1f}% [" in written
    assert written.partition("### What just happened")[2] == README.partition("### What just happened")[2]


def test_chat(shortened: Shortened):
    (command,) = [c for c in readme_commands() if "/ultravox chat" in c]
    done = shortened.run(command, input="/audio examples/question.wav\n\nand then?\n/quit\n")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout


@pytest.mark.parametrize("target", sorted({c.split()[1] for c in readme_commands() if c.startswith("make ")}))
def test_make_target(target: str):
    assert subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True).returncode == 0


def test_python(shortened: Shortened):
    (code,) = blocks("python")
    code = code.replace("runs/quickstart", str(shortened.folder / "quickstart"))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) >= 2
