"""Runs that begin with the weights of another: from a run, a checkpoint, a saved model; and what does not fit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import tiny_config

from ultravox.cli.main import main
from ultravox.config.load import dump_config
from ultravox.config.schema import RunConfig
from ultravox.data.order import Position
from ultravox.errors import CheckpointError
from ultravox.model.factory import build_model, build_processor, load_model
from ultravox.model.fast import use_fast_kernels
from ultravox.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from ultravox.training.identity import base_models
from ultravox.training.init_from import begin_from, find_start
from ultravox.training.run import run_training
from ultravox.training.seeding import seed_everything
from ultravox.training.speech import prepare_speech
from ultravox.training.tune import TuneTask


def config_for(parts, run_dir, *stages, init_from=None, model=None):
    """Stages by their names and steps."""
    content = tiny_config(*parts, run_dir).model_dump(mode="json")
    content["stages"] = [
        stage | {"max_steps": steps, "evaluate_every": 0, "optim": stage["optim"] | {"warmup_steps": 0}}
        for name, steps in stages
        for stage in content["stages"]
        if stage["name"] == name
    ]
    content["model"] |= model or {}
    return RunConfig.model_validate({**content, "init_from": init_from and str(init_from)})


@pytest.fixture(scope="module")
def old(parts, tmp_path_factory):
    """The folder of a run that is over."""
    folder = tmp_path_factory.mktemp("old") / "run"
    run_training(config_for(parts, folder, ("align", 8), ("tune", 6)))
    return folder


@pytest.fixture(scope="module")
def projector_only(parts, tmp_path_factory):
    """The folder of a run without adapters."""
    folder = tmp_path_factory.mktemp("projector") / "run"
    run_training(config_for(parts, folder, ("align", 4), model={"language_model_lora": {"rank": 0}}))
    return folder


def newest(run):
    return sorted((run / "checkpoints").iterdir())[-1]


def loss_of_first_step(config, weights=None):
    """The loss of the first two batches, of a model with these weights or with fresh ones."""
    seed_everything(config.seed, "model")
    processor, model = build_processor(config.model), build_model(config.model)
    use_fast_kernels(model)
    if weights is not None:
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, tensor in weights.items():
                parameters[name].copy_(tensor)
    task = TuneTask(model, processor, prepare_speech(config, model, processor), config.stages[0], config.seed)
    task.train_mode()
    outputs = [task.loss(task.batch(Position(0, 0, index))) for index in range(2)]
    return sum(output.sum.item() for output in outputs) / sum(output.count for output in outputs)


def test_a_new_run_begins_where_the_old_one_ended(parts, old, tmp_path, capsys):
    config = config_for(parts, tmp_path / "new", ("tune", 2), init_from=tmp_path / "source")
    shutil.copytree(old, tmp_path / "source")
    path = tmp_path / "new.yaml"
    path.write_text(dump_config(config))
    assert main(["train", str(path)]) == 0
    assert "begins from" in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "new" / "log.jsonl").read_text().splitlines()]
    first = next(row for row in rows if "loss" in row)
    assert first["step"] == 1, "steps begin anew"
    assert first["loss"] == pytest.approx(loss_of_first_step(config, load_checkpoint(newest(old)).trainable), rel=1e-6)
    assert first["loss"] != pytest.approx(loss_of_first_step(config), rel=1e-2)
    state = load_checkpoint(newest(tmp_path / "new"))
    assert {tensor.item() for name, tensor in state.optimizer.items() if name.endswith(".step")} == {2.0}
    assert json.loads((tmp_path / "new" / "train.json").read_text())["init_from"] == {
        "path": str(newest(tmp_path / "source")),
        "sha256": state.state["run"]["init_from"]["sha256"],
    }

    # Resumed, it continues itself: the old run is not needed again, and another one is refused
    for command, error in (
        (["--resume", "--init-from", str(old)], f"init_from was '{tmp_path}"),
        (["--resume", "--init_from", "null"], "is no longer there"),
    ):
        assert main(["train", str(path), *command]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "cannot resume from" in line
        assert error in line
    shutil.rmtree(tmp_path / "source")
    (tmp_path / "new" / "train.json").unlink()
    assert main(["train", str(path), "--resume"]) == 0
    assert "init_from" in json.loads((tmp_path / "new" / "train.json").read_text())


def test_each_kind_of_place(parts, old, projector_only, tmp_path):
    run_dir = tmp_path / "new"
    for path in (old, old / "model", newest(old)):
        assert find_start(str(path), run_dir).folder == newest(old)
    assert find_start(str(old / "checkpoints" / "align-000008"), run_dir).folder.name == "align-000008"
    saved = shutil.copytree(projector_only / "model", tmp_path / "saved")
    (tmp_path / "run").mkdir()
    shutil.copytree(projector_only / "model", tmp_path / "run" / "model")
    expected = load_model(saved)[0].multi_modal_projector.state_dict()
    for path in (saved, tmp_path / "run", projector_only):
        config = config_for(parts, run_dir, ("tune", 2), init_from=path)
        model = build_model(config.model)
        begun = begin_from(config.init_from, run_dir, model, config.model, base_models(config))
        assert len(begun["sha256"]) == 64
        found = model.multi_modal_projector.state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        adapters = {name: p for name, p in model.named_parameters() if name.endswith("lora_B")}
        assert adapters, "which begin anew, where there were none"
        assert not any(p.any() for p in adapters.values())


def test_a_trained_encoder_is_taken_over(parts, tmp_path):
    trains = {"train_audio_encoder": True, "language_model_lora": {"rank": 0}}
    run_training(config_for(parts, tmp_path / "old", ("align", 2), model=trains))
    weights = load_checkpoint(newest(tmp_path / "old")).trainable
    saved = shutil.copytree(tmp_path / "old" / "model", tmp_path / "saved")
    bases = base_models(config_for(parts, tmp_path, ("align", 2)))
    for path in (tmp_path / "old", saved):
        config = config_for(parts, tmp_path / "new", ("align", 2), init_from=path, model=trains)
        model = build_model(config.model)
        before = {name: p.detach().clone() for name, p in model.named_parameters() if name.startswith("audio_tower.")}
        begin_from(config.init_from, tmp_path / "new", model, config.model, bases)
        after = dict(model.named_parameters())
        assert all(torch.equal(after[n], tensor) for n, tensor in weights.items() if not n.startswith("objective."))
        assert any(not torch.equal(after[name], before[name]) for name in before)
        frozen = config_for(
            parts, tmp_path / "new", ("align", 2), init_from=path, model={"language_model_lora": {"rank": 0}}
        )
        model = build_model(frozen.model)
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        with pytest.raises(
            CheckpointError, match=r"audio_tower\.\S+ .* frozen here.* set model\.train_audio_encoder true"
        ):
            begin_from(frozen.init_from, tmp_path / "new", model, frozen.model, bases)
        assert all(torch.equal(p, start[name]) for name, p in model.named_parameters()), "nothing was taken over"


def other_language_model(parts, folder):
    """A copy with one weight changed."""
    shutil.copytree(parts[0][0], folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--init-from", "{tmp}/none"], "no folder {tmp}/none: expected a run, a training checkpoint or a saved"),
        (["--init-from", "fixie-ai/ultravox-v0_5-llama-3_2-1b"], "hf download NAME --local-dir FOLDER"),
        (["--init-from", "{tmp}"], "{tmp} holds no weights: expected a run folder with checkpoints or a model/"),
        (["--init-from", "{tmp}/new/x"], "lies in {tmp}/new, which this run replaces: choose another --run_dir"),
        (["--init-from", "{tmp}/llm"], "holds a 'llama' model: expected an 'ultravox' model"),
        (["--init-from", "{tmp}/saved"], "adapters, which are merged in a saved model: name its run or a"),
        (["--init-from", "{old}", "--model.stack_factor", "2"], "model.stack_factor was 3, is 2"),
        (["--init-from", "{projector}/model", "--model.stack_factor", "2"], "model.stack_factor was 3, is 2"),
        (["--init-from", "{alone}", "--model.stack_factor", "2"], "{alone}: stack_factor was 3, is 2"),
        (["--init-from", "{alone}", "--model.projector", "mlp"], "projector_type was 'swiglu', is 'mlp'"),
        (["--init-from", "{old}", "--model.language_model_lora.rank", "2"], "language_model_lora.rank was 4, is 2"),
        (["--init-from", "{old}", "--model.language_model_lora.alpha", "1"], "lora.alpha was 8.0, is 1.0"),
        (["--init-from", "{old}", "--model.language_model", "{tmp}/llm"], "its language_model is '{llm}' ("),
        (
            ["--init-from", "{alone}", "--model.language_model", "{tmp}/llm"],
            "language_model.model.norm.weight differs and is frozen here: another base model",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(parts, old, projector_only, tmp_path, capsys, arguments, message):
    names = {"tmp": tmp_path, "old": old, "projector": projector_only, "llm": parts[0][0], "alone": tmp_path / "alone"}
    config = config_for(parts, tmp_path / "new", ("tune", 2))
    path = tmp_path / "new.yaml"
    path.write_text(dump_config(config))
    (tmp_path / "new" / "x").mkdir(parents=True)
    (tmp_path / "new" / "config.yaml").write_text("")
    other_language_model(parts, tmp_path / "llm")
    shutil.copytree(old / "model", tmp_path / "saved")
    shutil.copytree(projector_only / "model", tmp_path / "alone")
    assert main(["train", str(path), *(word.format(**names) for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert message.format(**names) in error
    assert len(error.strip().splitlines()) == 1
    assert (tmp_path / "new" / "x").is_dir(), "an earlier run is not touched"


def test_tensors_of_other_names_or_shapes_are_named(parts, old, tmp_path):
    """Where the settings are alike and the tensors are not, as of a file that was tampered with."""
    config = config_for(parts, tmp_path / "new", ("tune", 2), init_from=tmp_path / "tune-000006")
    folder = shutil.copytree(newest(old), tmp_path / "tune-000006")
    whole = load_checkpoint(folder)
    name = "multi_modal_projector.linear_1.weight"
    for changed, said in (
        ({"multi_modal_projector.more": torch.zeros(2)}, "multi_modal_projector.more is not in this model"),
        ({name: torch.zeros(2, 3)}, rf"{name} has shape \[2, 3\] there, \[\d+, \d+\] here"),
        ({name: None}, f"{name} trains here, is not there"),
    ):
        state = {n: t for n, t in {**whole.trainable, **changed}.items() if t is not None}
        save_checkpoint(folder, Checkpoint(state, whole.optimizer, whole.state))
        with pytest.raises(CheckpointError, match=said):
            begin_from(config.init_from, tmp_path / "new", build_model(config.model), config.model, base_models(config))
