"""Language models of other families train too, each with an attention that computes what its own does."""

import json

import pytest
import torch
from tiny_run import tiny_config
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ultravox.model.fast_attention import use_fast_attention, use_short_attention
from ultravox.model.kernels import ATTENTION_NAME
from ultravox.training.run import run_training

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_other_families_train(parts, tmp_path, family):
    (llama, whisper), tones = parts
    tokenizer = AutoTokenizer.from_pretrained(llama)
    torch.manual_seed(0)
    if family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**{**SIZES, "vocab_size": len(tokenizer)}))
    else:  # with its usual dropout in attention
        model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4))
        model.generation_config.pad_token_id = 0
    model.save_pretrained(tmp_path / family)
    tokenizer.save_pretrained(tmp_path / family)
    config = tiny_config((tmp_path / family, whisper), tones, tmp_path / "run").model_dump(mode="json")
    config["stages"] = config["stages"][1:]
    config["stages"][0] |= {"max_steps": 4, "accumulation_steps": 1}
    config["stages"][0]["optim"]["warmup_steps"] = 0
    if family == "gpt2":  # its layers are no nn.Linear
        config["model"]["language_model_lora"]["rank"] = 0
    run_training(type(tiny_config(*parts, tmp_path)).model_validate(config))
    (stage,) = json.loads((tmp_path / "run" / "train.json").read_text())["stages"]
    assert stage["steps"] == 4
    assert stage["skipped_steps"] == 0
    assert 0 < stage["final_loss"] < 20


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (Qwen2ForCausalLM, Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1)),
        (Qwen3ForCausalLM, Qwen3Config(**SIZES)),
        (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=4)),
    ],
)
def test_plain_kinds_compute_the_same(kind, config):
    model = wild(kind(config))
    x = torch.randn(2, 9, 32)
    expected = model(inputs_embeds=x).logits
    use_short_attention(model)
    use_fast_attention(model)
    assert model.config._attn_implementation == ATTENTION_NAME
    # float32 in another order, logits of order 10; a window or a mask that is not kept would show in the first digit
    torch.testing.assert_close(model(inputs_embeds=x).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_kind_with_a_soft_cap_keeps_its_own_attention():
    config = Gemma2Config(**SIZES, attn_logit_softcapping=1.0, query_pre_attn_scalar=1)
    config._attn_implementation = "eager"  # the one that caps
    model = wild(Gemma2ForCausalLM(config))
    x = torch.randn(2, 9, 32)
    expected = model(inputs_embeds=x).logits
    use_short_attention(model)
    use_fast_attention(model)
    assert model.config._attn_implementation == "eager"
    assert torch.equal(model(inputs_embeds=x).logits, expected)
    config.attn_logit_softcapping = None
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert not torch.allclose(model(inputs_embeds=x).logits, expected)  # so the cap is felt here


def wild(model):
    """Evaluation mode and weights that make attention look at something."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.5)
    return model.eval()
