"""`ultravox checkpoint` on the checkpoints of a real run."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import tiny_config

from ultravox.cli.main import main
from ultravox.config.schema import RunConfig
from ultravox.training.checkpoint import load_checkpoint
from ultravox.training.run import run_training


@pytest.fixture(scope="module")
def run(parts, tmp_path_factory):
    models, tones = parts
    folder = tmp_path_factory.mktemp("checkpoints") / "run"
    content = tiny_config(models, tones, folder).model_dump(mode="json")
    for stage, steps in zip(content["stages"], (4, 6), strict=True):
        stage |= {"max_steps": steps, "checkpoint_every": 2, "evaluate_every": 0}
    content["checkpoints"] = {"keep_last": 10}
    run_training(RunConfig.model_validate(content))
    return folder


def test_inspect(run, capsys):
    assert main(["checkpoint", "inspect", str(run), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["stage"], row["step"], row["max_steps"]) for row in rows] == [
        ("align", 2, 4), ("align", 4, 4), ("tune", 2, 6), ("tune", 4, 6), ("tune", 6, 6),
    ]  # fmt: skip
    assert rows[-1]["metrics"]["wer"] >= 0
    assert rows[0]["metrics"] == {}
    assert set(rows[-1]["trainable_parameters"]) == {"multi_modal_projector", "language_model"}
    assert main(["checkpoint", "inspect", str(run / "checkpoints" / "tune-000004")]) == 0
    assert "4 of 6" in capsys.readouterr().out


def test_verify_names_what_is_damaged(run, tmp_path, capsys):
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out.count("whole") == 5
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    path = copy / "checkpoints" / "tune-000004" / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert main(["checkpoint", "verify", str(copy)]) == 2
    out = capsys.readouterr().out
    assert out.count("whole") == 4
    assert "optimizer.safetensors is damaged" in out


def test_convert_gives_the_model_that_the_run_wrote(run, tmp_path):
    assert main(["checkpoint", "convert", str(run), "--output", str(tmp_path / "model")]) == 0
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", run / "model"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    early = run / "checkpoints" / "tune-000002"
    assert main(["checkpoint", "convert", str(early), "--output", str(tmp_path / "early")]) == 0
    assert any(
        not torch.equal(tensor, theirs[name])
        for name, tensor in load_file(tmp_path / "early" / "model.safetensors").items()
    )


def test_average(run, tmp_path):
    assert main(["checkpoint", "average", str(run), "--last", "2", "--output", str(tmp_path / "model")]) == 0
    found = load_file(tmp_path / "model" / "model.safetensors")
    name = next(name for name in found if name.startswith("multi_modal_projector"))
    one, two = (load_checkpoint(run / "checkpoints" / f"tune-00000{step}").trainable[name] for step in (4, 6))
    torch.testing.assert_close(found[name], (one + two) / 2)
    assert not torch.equal(one, two)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "{tmp}"], "is no training checkpoint and holds none"),
        (["convert", "{run}", "--output", "{run}"], "is there already"),
        (["average", "{run}", "--last", "1", "--output", "{tmp}/m"], "expected 2 or more"),
        (["average", "{run}", "--last", "9", "--output", "{tmp}/m"], "holds 3 checkpoint(s) of its last stage"),
        (
            ["average", "{run}/checkpoints/align-000004", "{run}/checkpoints/tune-000002", "--output", "{tmp}/m"],
            "of different stages cannot be averaged",
        ),
    ],
)
def test_what_cannot_be_done_is_one_line(run, tmp_path, capsys, arguments, message):
    assert main(["checkpoint", *(word.format(run=run, tmp=tmp_path) for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
