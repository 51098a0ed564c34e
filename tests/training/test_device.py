"""Every pass finds its tensors on the model's device; which device that is."""

import pytest
import torch
from posing_device import DEVICE, PosingMode
from tiny_run import tiny_config

from ultravox.config.schema import RunConfig
from ultravox.errors import ConfigError
from ultravox.model.factory import build_model, build_processor
from ultravox.training.engines.device import choose_device
from ultravox.training.speech import prepare_speech, trainable_of
from ultravox.training.stage import TASKS

NEXT = {"weight": 0.5, "mask_share": 0.4, "mask_positions": 2}
END = {"end_text": "yes", "middle_text": "no"}
VARIANTS = {
    "plain": {},
    "packed": {"stage": {"packing": "auto"}},
    "encoder trains": {"model": {"train_audio_encoder": True}},
    "layer mix": {"model": {"audio_encoder_layer_mix": True}},
    "mean": {"model": {"downsampling": "mean"}},
    "ctc": {"model": {"projector": "ctc_compressed"}},
    "qformer": {"model": {"projector": "qformer"}},
    "boundaries": {"model": {"audio_boundaries": True}, "tune": {"boundary_share": 0.5}},
    "smoothed": {"tune": {"label_smoothing": 0.1, "z_loss_weight": 1e-3}},
    "distilled": {"tune": {"distillation": {"weight": 0.5}}},
    "head": {"tune": {"end_of_audio": {"variant": "head"}}},
    "early": {"tune": {"end_of_audio": {"variant": "early", "middle_positions": 2, **END}}},
    "late": {"tune": {"end_of_audio": {"variant": "late", "end_suffix": " yes", "cut_text": "no"}}},
    "next frame": {"tune": {"next_frame": NEXT}},
    "next frame, told apart": {"tune": {"next_frame": {**NEXT, "form": "contrastive", "target": "encoder"}}},
}


def config_of(parts, tmp_path, *, model=(), stage=(), tune=()):
    content = tiny_config(*parts, tmp_path / "run").model_dump(mode="json")
    content["model"] |= dict(model)
    content["stages"][1] |= dict(stage)
    content["stages"][1]["tune"] |= dict(tune)
    return RunConfig.model_validate(content)


def looked_at(config, stage, on_device):
    """Loss and squared gradient of a stage's first batch, and its evaluation."""
    torch.manual_seed(0)
    model, processor = build_model(config.model), build_processor(config.model)
    with PosingMode():
        if on_device:
            model.to(DEVICE)
        data = prepare_speech(config, model, processor)
        torch.manual_seed(1)
        task = TASKS[config.stages[stage].objective](model, processor, data, config.stages[stage], 1)
        data.trainable = task.trainable = trainable_of(model)
        task.parameter_groups()
        task.train_mode()
        output = task.loss(task.batch())
        output.sum.backward()
        assert (output.sum.device == DEVICE) == on_device
        gradients = [p.grad for p in task.trainable.values() if p.grad is not None]
        squares = sum(gradient.double().square().sum().item() for gradient in gradients)
        evaluation = task.evaluate() if stage == 0 else {}
    return output.sum.item(), squares, evaluation


ALIGNED = [name for name, changes in VARIANTS.items() if name == "plain" or "model" in changes]
"""The others align as the plain one does."""


@pytest.mark.parametrize(("variant", "stage"), [*((name, 0) for name in ALIGNED), *((name, 1) for name in VARIANTS)])
def test_a_pass_is_the_same_on_another_device(parts, tmp_path, variant, stage):
    config = config_of(parts, tmp_path, **VARIANTS[variant])
    loss, squares, evaluation = looked_at(config, stage, on_device=False)
    there = looked_at(config, stage, on_device=True)
    assert there[0] == pytest.approx(loss, rel=1e-4)
    assert there[1] == pytest.approx(squares, rel=1e-3)
    assert there[2] == pytest.approx(evaluation, rel=1e-4)
    assert squares > 0


def test_the_posing_device_is_strict():
    with PosingMode():
        there = torch.ones(3).to(DEVICE)
        assert there.device == DEVICE
        assert (2 * there).sum().item() == 6
        with pytest.raises(RuntimeError, match="tensors of two devices"):
            there + torch.ones(3)
        with pytest.raises(TypeError, match="bring it to the CPU"):
            there.numpy()
        assert there.cpu().numpy().tolist() == [1, 1, 1]


def test_which_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match="device cuda is not to be had here: choose auto or cpu"):
        choose_device("cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("mps")
    assert choose_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", 1) == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="LOCAL_RANK 2 has no GPU of its own, of 2"):
        choose_device("auto", 2)
