"""Tuning on packed rows: the loss and the gradients of padded ones, audio included, in any language model."""

import json

import pytest
import torch
from tiny_run import save_tiny_models, save_tones, tiny_config
from transformers import (
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ultravox.config.schema import StageConfig
from ultravox.data.collate import collate_tokens
from ultravox.errors import ModelError
from ultravox.metrics.token_predictions import shift_metrics
from ultravox.model import packing
from ultravox.model.factory import build_model, build_processor
from ultravox.model.fast import use_fast_kernels
from ultravox.tokens import IGNORE_INDEX
from ultravox.training import tune as module
from ultravox.training.run import run_training
from ultravox.training.speech import prepare_speech
from ultravox.training.tune import TuneTask

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**SMALL, **SPECIAL, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES = {
    "llama": None,
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, GROUPED),
    "mistral": (MistralForCausalLM, MistralConfig, {**GROUPED, "sliding_window": 14}),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, {**GROUPED, "sliding_window": 14}),
    "opt": (OPTForCausalLM, OPTConfig, {**SMALL, **SPECIAL, "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "mamba": (MambaForCausalLM, MambaConfig, {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 4, **SPECIAL}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of each family's tiny model, of the tiny Whisper, and of the tones."""
    root = tmp_path_factory.mktemp("families")
    llama, whisper = save_tiny_models(root)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    found = {"whisper": whisper, "tones": save_tones(root / "tones")}
    for name, family in FAMILIES.items():
        torch.manual_seed(3)
        if family is None:
            model = LlamaForCausalLM.from_pretrained(llama)
        else:
            kind, config, sizes = family
            model = kind(config(vocab_size=len(tokenizer), **sizes))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(5)  # so that attention and positions show
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        found[name] = root / name
    return found


def config_for(folders, family, run_dir, packing, **stage):
    config = tiny_config((folders[family], folders["whisper"]), folders["tones"], run_dir).model_dump(mode="json")
    config["model"]["language_model_lora"]["target_modules"] = (
        ["q_proj", "v_proj"] if family != "mamba" else ["in_proj"]
    )
    config["stages"] = config["stages"][1:]
    config["stages"][0] |= {"packing": packing, "max_steps": 3, "accumulation_steps": 1, **stage}
    config["stages"][0]["optim"]["warmup_steps"] = 0
    config["stages"][0].pop("augment")  # it changes a batch in place
    return type(tiny_config((folders[family], folders["whisper"]), folders["tones"], run_dir)).model_validate(config)


def gradients(task, batch):
    """Loss, count, and the gradient of everything that trains."""
    trainable = task.trainable
    output = task.loss(batch)
    found = torch.autograd.grad(output.sum, list(trainable.values()), allow_unused=True)
    return output, dict(zip(trainable, found, strict=True))


@pytest.mark.parametrize("row_width", [512, 64])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mamba"])
def test_packed_batches_train_as_padded_ones(folders, tmp_path, monkeypatch, family, row_width):
    """The same batch with its audio, through the task."""
    monkeypatch.setattr(packing, "DENSE_WIDTHS", (row_width, row_width))
    config = config_for(folders, family, tmp_path, "on", max_batch_tokens=400)
    model, processor = build_model(config.model), build_processor(config.model)
    data = prepare_speech(config, model, processor)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.1)
    padded = TuneTask(model, processor, data, config.stages[0].model_copy(update={"packing": "off"}), 1)
    assert padded.plan_mode == "padded"
    batch = padded.batch()
    assert len({len(ids) for ids in batch.input_ids}) > 1
    padded.train_mode()
    expected, reference = gradients(padded, batch)
    if family == "llama":
        use_fast_kernels(model)
    packed = TuneTask(model, processor, data, config.stages[0], 1)
    assert packed.plan_mode == ("packed" if family == "llama" else "best_fit")
    packed.train_mode()
    output, found = gradients(packed, batch)
    torch.testing.assert_close(output.sum, expected.sum, rtol=1e-5, atol=0)
    assert (output.count, output.num_tokens) == (expected.count, expected.num_tokens)
    assert shift_metrics(output.predictions) == pytest.approx(shift_metrics(expected.predictions))
    assert output.predictions.pairs.tolist() == expected.predictions.pairs.tolist()
    assert any("lora_B" in name for name in found)
    assert any("multi_modal_projector" in name and gradient.any() for name, gradient in found.items())
    for name, gradient in found.items():
        scale = float(reference[name].abs().max())
        torch.testing.assert_close(gradient, reference[name], rtol=1e-4, atol=1e-5 * scale, msg=lambda m, n=name: n + m)


def only(row):
    """`collate_tokens` with the labels of one row."""

    def collate(*args, **kwargs):
        tokens = collate_tokens(*args, **kwargs)
        tokens.labels[torch.arange(len(tokens.labels)) != row] = IGNORE_INDEX
        return tokens

    return collate


def test_one_clips_answer_teaches_nothing_about_anothers_audio(folders, tmp_path):
    config = config_for(folders, "qwen3", tmp_path, "on", max_batch_tokens=400)
    model, processor = build_model(config.model), build_processor(config.model)
    task = TuneTask(model, processor, prepare_speech(config, model, processor), config.stages[0], 1)
    model.eval()
    batch = task.batch()
    rows = range(len(batch.ids))
    assert len(rows) > 3
    batch.values.requires_grad_(True)
    for row, example_id in enumerate(batch.ids):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "collate_tokens", only(row))
            (gradient,) = torch.autograd.grad(task.loss(batch).sum, batch.values)
        assert torch.equal(gradient.abs().amax((1, 2)) > 0, torch.arange(len(rows)) == row), example_id


def test_whole_runs_with_packing_on_and_off(folders, tmp_path):
    for family, choice in (("mistral", "on"), ("llama", "off"), ("llama", "on")):
        folder = tmp_path / f"{family}-{choice}"
        run_training(config_for(folders, family, folder, choice))
        (stage,) = json.loads((folder / "train.json").read_text())["stages"]
        assert (stage["steps"], stage["skipped_steps"]) == (3, 0)
        assert 0 < stage["final_loss"] < 100


def test_a_model_that_cannot_pack_is_refused(folders, tmp_path):
    with pytest.raises(ModelError, match="packing: on, but MambaForCausalLM cannot keep packed clips apart"):
        run_training(config_for(folders, "mamba", tmp_path / "run", "on"))
    run_training(config_for(folders, "mamba", tmp_path / "auto", "auto"))
    assert (tmp_path / "auto" / "train.json").is_file()


def test_packing_is_for_tuning():
    with pytest.raises(ValueError, match="packing: on has no effect in a stage with objective 'align'"):
        StageConfig(name="align", objective="align", max_steps=1, packing="on")
