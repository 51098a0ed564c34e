"""The command line's frame: help, errors and exit codes; no command does real work here."""

import argparse
import errno
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

from ultravox import __version__
from ultravox.cli import main as cli
from ultravox.errors import AudioError
from ultravox.training.interrupt import TrainingInterrupted

CONFIG = "stages:\n  - {name: tune, objective: tune, max_steps: 3}\n"


@pytest.fixture
def fake_command(monkeypatch):
    """Put a command ``ask`` in place that calls the given function."""

    def install(run, **extra):
        module = types.ModuleType("ultravox.cli.ask")
        module.HELP = "Ask."
        module.add_arguments = lambda parser: parser.add_argument("word", nargs="?")
        module.run = run
        for key, value in extra.items():
            setattr(module, key, value)
        monkeypatch.setitem(sys.modules, "ultravox.cli.ask", module)

    return install


def raiser(error):
    def run(args):
        raise error

    return run


def test_help_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in cli.COMMANDS)


def test_no_command_shows_help_and_fails(capsys):
    assert cli.main([]) == 2
    assert "usage: ultravox" in capsys.readouterr().out


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"ultravox {__version__}\n"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name, capsys):
    assert cli.main([name, "--help"]) == 0
    assert f"usage: ultravox {name}" in capsys.readouterr().out


def test_train_help_lists_the_keys(capsys):
    cli.main(["train", "--help"])
    text = capsys.readouterr().out
    assert "--stages.NAME.optim.lr.projector  number ≥ 0, ≤ 1; default 0.001" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tran"], "unknown command 'tran'; did you mean 'train'?"),
        (["xyzzy"], "unknown command 'xyzzy'; choose from train, "),
        (["train"], "the following arguments are required: CONFIG"),
        (["train", "nothing.yaml"], "nothing.yaml: no such config file"),
        (["train", "--resum", "x.yaml"], "unknown option --resum; did you mean --resume?"),
        (["models"], "required: ACTION"),
        (["models", "fetch", "whisper-tini.en"], "did you mean 'whisper-tiny.en'?"),
        (["data", "fetch", "asterisk"], "did you mean 'asterisk-en'?"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(words, message, capsys):
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ultravox: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_config_mistake_names_file_and_line(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.replace("max_steps: 3", "max_steps: 3, optm: {}"))
    assert cli.main(["train", str(path)]) == 2
    expected = f"ultravox: error: {path}:2: unknown key 'optm' in stages.tune; did you mean 'optim'?\n"
    assert capsys.readouterr().err == expected


def test_overrides_reach_training(tmp_path, monkeypatch):
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    calls = []
    training = types.ModuleType("ultravox.training.run")
    training.run_training = lambda config, resume, overwrite: calls.append((config, resume))
    monkeypatch.setitem(sys.modules, "ultravox.training.run", training)
    words = ["train", "--stages.tune.max_steps", "10", str(path), "--resume", "--seed=-0", "--run_dir", str(tmp_path)]
    assert cli.main(words) == 0
    [(config, resume)] = calls
    assert (config.stages[0].max_steps, config.seed, config.run_dir, resume) == (10, 0, str(tmp_path), True)


def test_interrupted_training_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def stop(config, resume, overwrite):
        raise TrainingInterrupted(signal.SIGTERM)

    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    training = types.ModuleType("ultravox.training.run")
    training.run_training = stop
    monkeypatch.setitem(sys.modules, "ultravox.training.run", training)
    assert cli.main(["train", str(path)]) == 128 + signal.SIGTERM
    assert "--resume" in capsys.readouterr().err


def test_user_error_is_one_line(fake_command, capsys):
    fake_command(raiser(AudioError("x.wav: empty file;\n  expected audio")))
    assert cli.main(["ask"]) == 2
    assert capsys.readouterr().err == "ultravox: error: x.wav: empty file; expected audio\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a/b"), "a/b: the disk is full"),
        (PermissionError(errno.EACCES, "no", "a/b"), "a/b: permission denied"),
        (PermissionError(errno.EPERM, "no", "a/b"), "a/b: nothing can be written there"),
        (FileExistsError(errno.EEXIST, "no", "a/b"), "a/b: there is a file where a folder is needed"),
        (IsADirectoryError(errno.EISDIR, "no", "a/b"), "a/b: there is a folder where a file is needed"),
        (OSError(errno.ENAMETOOLONG, "no", "a/b"), "a/b: the name is too long"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full"),
    ],
)
def test_disk_errors_are_one_line(fake_command, capsys, error, message):
    fake_command(raiser(error))
    assert cli.main(["ask"]) == 2
    text = capsys.readouterr().err
    assert text.startswith(f"ultravox: error: {message}")
    assert text.count("\n") == 1


def test_our_own_faults_keep_their_traceback(fake_command):
    fake_command(raiser(ZeroDivisionError("a fault")))
    with pytest.raises(ZeroDivisionError):
        cli.main(["ask"])


def test_traceback_on_request(fake_command, monkeypatch):
    monkeypatch.setenv("ULTRAVOX_TRACEBACK", "1")
    fake_command(raiser(AudioError("x")))
    with pytest.raises(AudioError):
        cli.main(["ask"])


def test_interrupt(fake_command, capsys):
    fake_command(raiser(KeyboardInterrupt()))
    assert cli.main(["ask"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_exit_code_of_a_command(fake_command):
    fake_command(lambda args: 3)
    assert cli.main(["ask"]) == 3
    fake_command(lambda args: None)
    assert cli.main(["ask", "word"]) == 0


def test_a_reader_that_goes_away_is_no_fault():
    done = subprocess.run(
        f'{sys.executable} -c \'from ultravox.cli.main import main; main(["train", "--help"])\' | head -1',
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("words", "mine", "overrides"),
    [
        ("c.yaml --a.b 1", "c.yaml", "--a.b 1"),
        ("--a.b 1 c.yaml", "c.yaml", "--a.b 1"),
        ("--a.b=1 c.yaml --flag", "c.yaml --flag", "--a.b=1"),
        ("--option x --a -1 c.yaml", "--option x c.yaml", "--a -1"),
        ("c.yaml --a", "c.yaml", "--a"),
    ],
)
def test_overrides_are_parted_from_options(words, mine, overrides):
    parser = argparse.ArgumentParser()
    parser.add_argument("--flag", action="store_true")
    parser.add_argument("--option")
    assert cli.split_overrides(words.split(), parser) == (mine.split(), overrides.split())


def test_the_command_is_installed():
    command = Path(sys.executable).with_name("ultravox")
    assert subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout.startswith("ultra")
