"""Every projector and every way down to the language model's rate, against arithmetic and other people's classes."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import InstructBlipQFormerConfig
from transformers.models.instructblip.modeling_instructblip import InstructBlipQFormerMultiHeadAttention

from ultravox.audio.lengths import num_audio_tokens
from ultravox.config.schema import ModelConfig, RunConfig
from ultravox.model.configuration import DOWNSAMPLINGS, PROJECTORS, UltravoxConfig
from ultravox.model.downsample import Downsample, stack_frames
from ultravox.model.projectors import MlpProjector, TransformerProjector, build_projector, num_heads, sinusoids

WIDTH, K = 12, 3
WAYS = [(kind, "stack") for kind in PROJECTORS] + [
    (kind, way) for kind in ("swiglu", "linear", "mlp", "transformer") for way in DOWNSAMPLINGS[1:]
]


def make(kind, way="stack", k=K, **changes):
    torch.manual_seed(0)
    layers = 2 if kind in ("transformer", "qformer") else 0
    text = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 20}
    config = UltravoxConfig(
        text_config=text,
        stack_factor=k,
        hidden_size=32,
        projector=kind,
        downsampling=way,
        num_projector_layers=layers,
        **changes,
    )
    return build_projector(config, WIDTH).eval()


def clips(*lengths):
    """Random frames, zero past each clip's length."""
    torch.manual_seed(1)
    frames = torch.randn(len(lengths), max(lengths), WIDTH)
    for row, length in zip(frames, lengths, strict=True):
        row[length:] = 0
    return frames, torch.tensor(lengths)


@pytest.mark.parametrize(("kind", "way"), WAYS)
def test_the_length_is_that_of_the_one_function_and_padding_is_inert(kind, way):
    projector = make(kind, way)
    frames, lengths = clips(10, 1, 7, 3)
    found, counts = projector(frames, lengths)
    assert counts.tolist() == num_audio_tokens(lengths, K).tolist() == [4, 1, 3, 1]
    assert found.shape == (4, 4, 16)
    for row, (length, count) in enumerate(zip(lengths.tolist(), counts.tolist(), strict=True)):
        alone, number = projector(frames[row : row + 1, :length], lengths[row : row + 1])
        assert number.tolist() == [count]
        assert torch.allclose(found[row, :count], alone[0], atol=1e-5)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize(("kind", "way"), WAYS)
def test_each_frame_matters_and_each_weight_learns(kind, way):
    projector = make(kind, way)
    frames, lengths = clips(9, 8)
    frames.requires_grad_()
    found, counts = projector(frames, lengths)
    valid = torch.arange(found.shape[1]) < counts[:, None]
    found[valid].square().sum().backward()
    felt = frames.grad.abs().sum(2) > 0
    if way in ("stack", "mean"):
        assert felt[0].all()
        assert felt[1, :8].all()
    else:  # one of each k
        assert felt[0].int().unfold(0, K, K).sum(1).tolist() == [1, 1, 1]
    for name, parameter in projector.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0 or name.endswith("in_proj_bias"), name


@pytest.mark.parametrize(("kind", "way"), WAYS)
def test_a_new_one_is_as_loud_as_it_is_asked_to_be(kind, way):
    torch.manual_seed(0)
    layers = 2 if kind in ("transformer", "qformer") else 0
    text = {"model_type": "llama", "hidden_size": 256, "num_attention_heads": 2, "vocab_size": 20}
    config = UltravoxConfig(
        text_config=text, stack_factor=5, hidden_size=256, projector=kind, downsampling=way, num_projector_layers=layers
    )
    projector = build_projector(config, 64)
    projector.init_scale(0.13)
    found, _ = projector(torch.randn(4, 50, 64), torch.full((4,), 50))
    assert found.square().mean().sqrt().item() == pytest.approx(0.13, rel=0.25)


def test_ways_down_by_hand():
    frames = torch.arange(1.0, 8.0)[None, :, None].expand(2, 7, 1).clone()
    frames[1, 5:] = 0
    lengths = torch.tensor([7, 5])
    assert Downsample("stack", 3)(frames, lengths).tolist()[0] == [[1, 2, 3], [4, 5, 6], [7, 0, 0]]
    assert Downsample("stride", 3)(frames, lengths)[0, :, 0].tolist() == [1, 4, 7]
    means = Downsample("mean", 3)(frames, lengths)[:, :, 0]
    assert means[0].tolist() == [2, 5, 7]  # the tail's mean is over what is there
    assert means[1, :2].tolist() == [2, 4.5]
    middle = Downsample("random", 3).eval()(frames, lengths)[:, :, 0]
    assert middle[0].tolist() == [2, 5, 7]
    assert middle[1, :2].tolist() == [2, 4]


def test_random_takes_each_frame_and_never_padding():
    frames = torch.arange(1.0, 8.0)[None, :, None].expand(500, 7, 1).clone()
    lengths = torch.tensor([7, 5]).repeat(250)
    frames[1::2, 5:] = 0
    way = Downsample("random", 3).train()
    torch.manual_seed(3)
    found = way(frames, lengths)[:, :, 0]
    for place, expected in enumerate(([1, 2, 3], [4, 5, 6], [7])):
        assert found[::2, place].unique().tolist() == expected
    assert found[1::2, 1].unique().tolist() == [4, 5]
    torch.manual_seed(3)
    assert torch.equal(way(frames, lengths)[:, :, 0], found), "a seed gives the same run"


def test_mlp_is_torchs_sequence_with_small_init():
    projector = make("mlp")
    reference = nn.Sequential(
        nn.LayerNorm(3 * WIDTH), nn.Linear(3 * WIDTH, 32), nn.ReLU(), nn.LayerNorm(32), nn.Linear(32, 16)
    )
    names = ("norm_in", "linear_in", None, "norm_out", "linear_out")
    for layer, name in zip(reference, names, strict=True):
        if name:
            layer.load_state_dict(getattr(projector, name).state_dict())
    frames, lengths = clips(9)
    assert torch.allclose(projector(frames, lengths)[0], reference(stack_frames(frames, K)), atol=1e-6)
    torch.manual_seed(0)
    large = MlpProjector(80, 1000, 500, Downsample("stack", 5))
    assert large.linear_in.weight.std().item() == pytest.approx((2 / (5 * 400)) ** 0.5, rel=0.02)
    assert large.linear_out.weight.std().item() == pytest.approx((2 / (5 * 1000)) ** 0.5, rel=0.02)
    assert not large.linear_in.bias.any()


def test_conv_is_torchs_convolutions():
    projector = make("conv")
    frames, lengths = clips(9)
    x = F.layer_norm(frames, (WIDTH,)).transpose(1, 2)
    x = F.gelu(F.conv1d(x, projector.conv_1.weight, projector.conv_1.bias, padding=1))
    x = F.gelu(F.conv1d(x, projector.conv_2.weight, projector.conv_2.bias, stride=K)).transpose(1, 2)
    expected = F.linear(F.layer_norm(x, (32,)), projector.linear_out.weight, projector.linear_out.bias)
    assert torch.allclose(projector(frames, lengths)[0], expected, atol=1e-5)


def test_transformer_is_pre_norm_attention_by_hand():
    torch.manual_seed(0)
    projector = TransformerProjector(WIDTH, 32, 16, Downsample("stride", 2), num_layers=1).eval()
    frames, lengths = clips(8)
    x = projector.linear_in(F.layer_norm(frames[:, ::2], (WIDTH,))) + sinusoids(4, 32)
    (layer,) = projector.layers
    normed = F.layer_norm(x, (32,))
    q, k, v = F.linear(normed, layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias).chunk(3, -1)
    heads = num_heads(32)
    q, k, v = (part.view(1, 4, heads, -1).transpose(1, 2) for part in (q, k, v))
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, 4, 32)
    x = x + layer.self_attn.out_proj(attended)
    x = x + layer.linear2(F.gelu(layer.linear1(F.layer_norm(x, (32,)))))
    expected = projector.linear_out(F.layer_norm(x, (32,)))
    assert torch.allclose(projector(frames, lengths)[0], expected, atol=1e-5)


def test_the_q_formers_cross_attention_is_hugging_faces():
    """One query of a window over its true frames: the attention of InstructBLIP's Q-Former with the same weights."""
    projector = make("qformer")
    attention = projector.layers[0].multihead_attn
    config = InstructBlipQFormerConfig(hidden_size=32, encoder_hidden_size=32, num_attention_heads=attention.num_heads)
    config._attn_implementation = "eager"
    reference = InstructBlipQFormerMultiHeadAttention(config, is_cross_attention=True).eval()
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    for layer, weight, bias in zip((reference.query, reference.key, reference.value), weights, biases, strict=True):
        layer.weight.data, layer.bias.data = weight.data, bias.data
    query, frames = torch.randn(2, 1, 32), torch.randn(2, K, 32)
    missing = torch.tensor([[False, False, False], [False, True, True]])
    bias = torch.zeros(2, 1, 1, K).masked_fill(missing[:, None, None], torch.finfo(torch.float32).min)
    expected = reference(query, encoder_hidden_states=frames, encoder_attention_mask=bias)[0]
    found = attention(query, frames, frames, key_padding_mask=missing)[0]
    assert torch.allclose(found, attention.out_proj(expected), atol=1e-5)


def test_positions_are_whispers():
    from transformers.models.whisper.modeling_whisper import sinusoids as whispers

    assert torch.allclose(sinusoids(50, 64), whispers(50, 64), atol=1e-5)


def test_config_names_what_is_ours_only_where_it_is_not_the_public_form():
    plain = json.loads(UltravoxConfig().to_json_string())
    assert "projector" not in plain
    assert "downsampling" not in plain
    ours = UltravoxConfig(projector="qformer", num_projector_layers=2)
    content = json.loads(ours.to_json_string())
    assert content["projector"] == "qformer"
    assert UltravoxConfig(**content).num_projector_layers == 2
    with pytest.raises(ValueError, match=r"projector 'perceiver' .* not known.*a newer version"):
        UltravoxConfig(projector="perceiver")
    with pytest.raises(ValueError, match="2 projector layers is not supported"):
        UltravoxConfig(num_projector_layers=2)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"projector": "mlp", "projector_layers": 2}, "projector_layers has no effect on the projector 'mlp'"),
        ({"projector": "conv", "downsampling": "mean"}, "leave downsampling at stack"),
    ],
)
def test_options_that_do_nothing_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**model)


def test_a_position_longer_than_any_clip_is_refused():
    with pytest.raises(ValueError, match=r"stack_factor 50 makes one position of 1 s of audio, more than the 0.5 s"):
        RunConfig(
            model={"stack_factor": 50},
            data={"max_audio_seconds": 0.5},
            stages=[{"name": "tune", "objective": "tune", "max_steps": 1}],
        )
