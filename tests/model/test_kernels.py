"""The fast kernels compute what plain PyTorch computes, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ultravox.model.adapters import add_lora, lora_layers, merged_lora, project_together
from ultravox.model.fast_attention import Packing, _RotaryAttention, takes_packed_rows, use_fast_attention
from ultravox.model.fast_mlp import use_fast_mlps
from ultravox.model.kernels import register_attention, short_attention, use_fast_linears, use_fast_norms


def gradients(output, inputs):
    torch.manual_seed(3)
    return torch.autograd.grad((output * torch.randn_like(output)).sum(), inputs)


@pytest.mark.parametrize("shape", [(7, 12), (3, 5, 12)])
def test_lora_equals_its_formula(shape):
    torch.manual_seed(0)
    parent = nn.Sequential(nn.Linear(12, 20))
    add_lora(parent, 4, 8.0, ["0"])
    layer = lora_layers(parent)["0"]
    nn.init.normal_(layer.lora_B)
    x = torch.randn(shape, requires_grad=True)
    expected = F.linear(x, layer.weight, layer.bias) + 2 * F.linear(F.linear(x, layer.lora_A), layer.lora_B)
    inputs = [x, layer.lora_A, layer.lora_B]
    torch.testing.assert_close(layer(x), expected)
    for mine, reference in zip(gradients(layer(x), inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(mine, reference)
    with merged_lora(parent):
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_adapted_layers_of_one_input_are_the_same_together(bias):
    torch.manual_seed(0)
    parent = nn.ModuleDict({name: nn.Linear(12, out, bias) for name, out in (("q", 20), ("k", 8), ("v", 8))})
    add_lora(parent, 4, 8.0, ["q", "k", "v"])
    layers = list(lora_layers(parent).values())
    for layer in layers:
        nn.init.normal_(layer.lora_B)
    adapters = [parameter for parameter in parent.parameters() if parameter.requires_grad]
    assert len(adapters) == 6
    x = torch.randn(3, 5, 12, requires_grad=True)
    scales = torch.randn(3)
    apart = sum(scale * layer(x).square().sum() for scale, layer in zip(scales, layers, strict=True))
    outputs = project_together(layers, x)
    together = sum(scale * output.square().sum() for scale, output in zip(scales, outputs, strict=True))
    assert outputs[0].grad_fn.next_functions[0][0] is outputs[2].grad_fn.next_functions[0][0]
    expected = torch.autograd.grad(apart, [x, *adapters])
    for mine, other in zip(torch.autograd.grad(together, [x, *adapters]), expected, strict=True):
        torch.testing.assert_close(mine, other)
    mixed = [*layers, nn.Linear(12, 3)]
    for mine, layer in zip(project_together(mixed, x), mixed, strict=True):
        torch.testing.assert_close(mine, layer(x))


def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, mean=1.0, std=0.2)
    return model


def test_a_whole_language_model_is_the_same_with_fast_kernels():
    model = tiny_llama()
    x = torch.randn(3, 9, 32, requires_grad=True)
    expected = model(inputs_embeds=x).logits
    reference = gradients(expected, [x])[0]
    names = list(model.state_dict())
    use_fast_linears(model)
    use_fast_norms(model)
    use_fast_mlps(model)
    model.set_attn_implementation(register_attention())
    use_fast_attention(model)
    model.train()
    assert list(model.state_dict()) == names
    output = model(inputs_embeds=x).logits
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradients(output, [x])[0], reference)


def test_fast_layers_applied_twice_are_those_of_once():
    model = tiny_llama()
    add_lora(model, 4, 8.0, ["q_proj", "gate_proj", "up_proj", "down_proj"])
    x = torch.randn(2, 9, 32)
    expected = model(inputs_embeds=x).logits
    model.set_attn_implementation(register_attention())
    for make_fast in (use_fast_linears, use_fast_norms, use_fast_mlps, use_fast_attention):
        make_fast(model)
        kinds = [type(module) for module in model.modules()]
        make_fast(model)
        assert [type(module) for module in model.modules()] == kinds
    for training in (True, False):
        torch.testing.assert_close(model.train(training)(inputs_embeds=x).logits, expected)
    model.requires_grad_(True)  # norms that train go their plain way
    with torch.no_grad():
        torch.testing.assert_close(model(inputs_embeds=x).logits, expected)


@pytest.mark.parametrize("name", ["softcap", "s_aux", "head_mask", "cu_seq_lens_q"])
def test_the_attention_refuses_what_it_does_not_compute(name):
    query = torch.randn(1, 2, 5, 8)
    short_attention(nn.Module(), query, query, query, None, position_ids=torch.arange(5), **{name: None})
    with pytest.raises(ValueError, match=f"knows no {name}"):
        short_attention(nn.Module(), query, query, query, None, **{name: torch.ones(2)})


def test_an_adapted_swiglu_layer_is_the_same_in_one_step():
    model = tiny_llama()
    plain = model.model.layers[0].mlp
    add_lora(plain, 4, 8.0, ["gate_proj", "up_proj", "down_proj"])
    for layer in lora_layers(plain).values():
        nn.init.normal_(layer.lora_B)
    adapters = [parameter for parameter in plain.parameters() if parameter.requires_grad]
    assert len(adapters) == 6
    x = torch.randn(3, 9, 32, requires_grad=True)
    expected = plain(x)
    reference = gradients(expected, [x, *adapters])
    use_fast_mlps(model)
    output = plain(x)
    assert "_LoraSwiglu" in str(output.grad_fn.next_functions)
    torch.testing.assert_close(output, expected)
    for mine, other in zip(gradients(output, [x, *adapters]), reference, strict=True):
        torch.testing.assert_close(mine, other)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), expected)


def test_a_norm_that_trains_keeps_its_gradient():
    model = tiny_llama()
    use_fast_norms(model)
    model.model.norm.weight.requires_grad_(True)
    model(inputs_embeds=torch.randn(1, 4, 32)).logits.sum().backward()
    assert model.model.norm.weight.grad is not None


def test_fast_attention_generates_with_a_cache_as_before():
    torch.manual_seed(0)
    prompt = torch.randint(50, (2, 7))
    expected = tiny_llama().generate(prompt, max_new_tokens=8, do_sample=False)
    model = tiny_llama()
    model.set_attn_implementation(register_attention())
    use_fast_attention(model)
    for training in (False, True):
        assert torch.equal(model.train(training).generate(prompt, max_new_tokens=8, do_sample=False), expected)


@pytest.mark.parametrize("kept_tokens", [5, 4])
def test_grouped_rotary_attention_in_double_precision(monkeypatch, kept_tokens):
    monkeypatch.setattr("ultravox.model.fast_attention.MAX_KEPT_TOKENS", kept_tokens)  # 4: weights made again
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 5, n * 8, dtype=torch.float64, requires_grad=True) for n in (4, 2, 2))
    angles = torch.randn(1, 5, 4, dtype=torch.float64).repeat(1, 1, 2)
    bias = torch.full((1, 1, 5, 5), -torch.inf, dtype=torch.float64).triu(1)
    rest = (angles.cos(), angles.sin(), bias, 8, 0.3)
    assert torch.autograd.gradcheck(lambda *qkv: _RotaryAttention.apply(*qkv, *rest), (query, key, value))


def test_packed_rows_train_as_padded_ones_do():
    model = tiny_llama()
    model.set_attn_implementation(register_attention())
    x = torch.randn(3, 40, 32, requires_grad=True)
    mask = torch.arange(40) < torch.tensor([[40], [7], [23]])
    weight = torch.randn(3, 40, 32) * mask[:, :, None]
    expected = model.model(inputs_embeds=x).last_hidden_state
    (reference,) = torch.autograd.grad((expected * weight).sum(), x)
    assert not takes_packed_rows(model)
    use_fast_attention(model)
    assert takes_packed_rows(model.train())
    packing = Packing.of(mask)
    assert packing.num_rows == 70
    assert len(packing.to_packed) == 96
    output = packing.unpack(
        model.model(inputs_embeds=packing.pack(x), use_cache=False, **packing.arguments(x)).last_hidden_state
    )
    torch.testing.assert_close(output[mask], expected[mask])
    torch.testing.assert_close(torch.autograd.grad((output * weight).sum(), x)[0], reference)
