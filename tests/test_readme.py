"""Every command of the README is run, on a run that is short: the same recipe, a few clips and a few steps."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
        words = [word for word in shlex.split(command) if word]
        words = [self._replace(word) for word in words]
        if "evaluate" in words:
            words += ["--limit", "3"]
        if "benchmarks/readme.py" in words:  # into a copy: the repository's own numbers are not those of a short run
            shutil.copy(ROOT / "README.md", self.folder)
            words += ["--readme", str(self.folder / "README.md"), "--kept", str(self.folder / "kept")]
        if "train" in words and "--run_dir" not in words:
            words += ["--run_dir", str(self.folder / "quickstart")]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, **options)

    def _replace(self, word: str) -> str:
        if word.endswith("/ultravox"):
            return str(Path(sys.executable).with_name("ultravox"))
        if word.endswith("/python"):
            return sys.executable
        if word == "configs/quickstart.yaml":
            return str(self.folder / "short.yaml")
        if word.startswith("runs/"):
            return str(self.folder / word.removeprefix("runs/"))
        return {"500": "3"}.get(word, word)


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


@pytest.mark.parametrize("command", [c for c in readme_commands() if ".venv/bin/" in c and "chat" not in c])
def test_command(command: str, shortened: Shortened):
    done = shortened.run(command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout or "train" in command or "benchmarks" in command


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
