"""Every projector and downsampling: lengths, inert padding, scale, code that others wrote, checkpoints, refusals."""

import itertools
import json

import pytest
import torch
from torch import nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer

from ultravox.audio.lengths import num_audio_tokens
from ultravox.config.load import parse_config
from ultravox.config.model import ModelConfig
from ultravox.errors import ConfigError, DataError, ModelError
from ultravox.model.configuration import PROJECTORS, UltravoxConfig
from ultravox.model.downsample import DOWNSAMPLINGS, downsample
from ultravox.model.factory import build_model, build_processor, load_model, save_model
from ultravox.model.manifest import MANIFEST_FILE
from ultravox.model.projector import LinearProjector, MlpProjector, SwigluProjector
from ultravox.model.projector_factory import projector_from_config
from ultravox.model.sequence_projectors import (
    ConvProjector,
    QFormerProjector,
    TransformerLayer,
    TransformerProjector,
    num_heads,
    prime_factors,
)

WIDTH, HIDDEN, OUT = 12, 16, 10


def make(kind: str, factor: int, downsampling: str = "stack", queries: int = 1, hidden: int = HIDDEN):
    if kind in ("swiglu", "swiglu_v0.4"):
        return SwigluProjector(WIDTH, hidden, OUT, factor, ln_mid=kind == "swiglu", downsampling=downsampling)
    if kind == "linear":
        return LinearProjector(WIDTH, OUT, factor, downsampling=downsampling)
    if kind == "mlp":
        return MlpProjector(WIDTH, hidden, OUT, factor, downsampling=downsampling)
    if kind == "conv":
        return ConvProjector(WIDTH, hidden, OUT, factor)
    if kind == "transformer":
        sizes = {"num_layers": 2, "num_heads": 3, "feed_forward_width": 20, "max_positions": 64}
        return TransformerProjector(WIDTH, OUT, factor, **sizes, downsampling=downsampling)
    return QFormerProjector(WIDTH, hidden, OUT, factor, num_layers=2, num_queries=queries)


FORMS = [
    *((kind, way, 1) for kind in ("swiglu", "swiglu_v0.4", "linear", "mlp", "transformer") for way in DOWNSAMPLINGS),
    ("conv", "stack", 1),
    ("qformer", "stack", 1),
    ("qformer", "stack", 3),
]


@pytest.mark.parametrize(("kind", "downsampling", "queries"), FORMS)
@pytest.mark.parametrize("factor", [1, 2, 3, 5, 10, 12])
def test_lengths_are_those_of_the_one_function_and_padding_is_inert(kind, downsampling, queries, factor):
    """In a batch, each clip gives what it gives alone; one has a single frame, one fewer than a group, one a tail."""
    torch.manual_seed(0)
    projector = make(kind, factor, downsampling, queries).eval()
    lengths = torch.tensor([31, 1, 4, 23, 24])
    frames = torch.randn(5, 31, WIDTH)
    for row, length in zip(frames, lengths.tolist(), strict=True):
        row[length:] = 0
    with torch.no_grad():
        together, token_lengths = projector(frames, lengths)
        assert together.shape == (5, num_audio_tokens(31, factor), OUT)
        assert torch.equal(token_lengths, num_audio_tokens(lengths, factor))
        assert torch.isfinite(together).all()
        for row, length in enumerate(lengths.tolist()):
            alone, _ = projector(frames[row : row + 1, :length], torch.tensor([length]))
            assert alone.shape[1] == token_lengths[row]
            torch.testing.assert_close(together[row, : alone.shape[1]], alone[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "downsampling", "queries"), FORMS)
def test_the_last_frame_is_heard(kind, downsampling, queries):
    """A tail of one frame decides its position."""
    torch.manual_seed(0)
    projector = make(kind, 5, downsampling, queries).eval()
    frames, lengths = torch.randn(1, 11, WIDTH), torch.tensor([11])
    changed = frames.clone()
    changed[:, -1] = torch.randn(WIDTH)
    with torch.no_grad():
        difference = (projector(frames, lengths)[0] - projector(changed, lengths)[0])[0, -1]
    assert difference.abs().max() > 1e-3


@pytest.mark.parametrize(("kind", "downsampling", "queries"), FORMS)
def test_every_weight_learns(kind, downsampling, queries):
    torch.manual_seed(0)
    projector = make(kind, 2, downsampling, queries).train()
    output, _ = projector(torch.randn(3, 9, WIDTH), torch.tensor([9, 9, 9]))
    output.square().sum().backward()
    # a key's bias moves all scores of a softmax alike
    silent = [name for name, p in projector.named_parameters() if p.grad is None or not p.grad.any()]
    allowed = ["k_proj.bias"]
    if kind == "qformer" and queries == 1:  # attention of one query to itself
        allowed += [f"self_attn.{part}_proj.{of}" for part in "qk" for of in ("weight", "bias")]
    assert [name for name in silent if not name.endswith(tuple(allowed))] == []


@pytest.mark.parametrize("kind", ["swiglu", "swiglu_v0.4", "linear", "mlp", "conv", "transformer", "qformer"])
@pytest.mark.parametrize("factor", [5, 10])
def test_output_scale(kind, factor):
    """The first embeddings are as loud as they are told to be, however loud the frames are."""
    torch.manual_seed(0)
    projector = make(kind, factor, hidden=256)
    projector.init_scale(0.13)
    output, _ = projector(3 * torch.randn(8, 100, WIDTH), torch.full((8,), 100))
    assert float(output.detach().square().mean().sqrt()) == pytest.approx(0.13, rel=0.25)


@pytest.mark.parametrize("kind", ["linear", "mlp", "conv", "transformer", "qformer"])
@pytest.mark.parametrize(("clips", "frames"), [(0, 4), (2, 0)])
def test_nothing_gives_nothing(kind, clips, frames):
    output, lengths = make(kind, 2)(torch.zeros(clips, frames, WIDTH), torch.zeros(clips, dtype=torch.long))
    assert output.shape == (clips, frames // 2, OUT)
    assert lengths.tolist() == [0] * clips


# Downsampling


def test_ways_by_hand():
    frames = torch.arange(14.0).reshape(2, 7, 1) + 1
    frames[1, 4:] = 0
    lengths = torch.tensor([7, 4])
    assert downsample(frames, lengths, 3, "stride")[..., 0].tolist() == [[1, 4, 7], [8, 11, 0]]
    assert downsample(frames, lengths, 3, "mean")[..., 0].tolist() == [[2, 5, 7], [9, 11, 0]]
    assert downsample(frames, lengths, 3, "random")[..., 0].tolist() == [[2, 5, 7], [9, 11, 0]]
    assert downsample(frames, lengths, 3)[1].tolist() == [[8, 9, 10], [11, 0, 0], [0, 0, 0]]


def test_a_random_frame_is_one_of_the_group_and_of_the_clip():
    frames = torch.arange(8.0).reshape(1, 8, 1).repeat(2000, 1, 1)
    torch.manual_seed(3)
    drawn = downsample(frames, torch.full((2000,), 8), 5, "random", training=True)[..., 0]
    counts = [torch.bincount(drawn[:, group].long(), minlength=8).tolist() for group in (0, 1)]
    assert counts[0][5:] == [0, 0, 0] == counts[1][:3]
    assert counts[1][3:5] == [0, 0]
    assert all(320 < count < 480 for count in counts[0][:5])  # 400 ± 4.5 standard deviations
    assert all(570 < count < 765 for count in counts[1][5:])  # 667
    torch.manual_seed(3)
    again = downsample(frames, torch.full((2000,), 8), 5, "random", training=True)[..., 0]
    assert torch.equal(drawn, again)


# Code that others wrote


def test_mlp_is_that_of_torch():
    torch.manual_seed(0)
    ours = make("mlp", 3)
    layers = nn.Sequential(
        nn.LayerNorm(3 * WIDTH), nn.Linear(3 * WIDTH, HIDDEN), nn.ReLU(), nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, OUT)
    )
    layers.load_state_dict(dict(zip(layers.state_dict(), ours.state_dict().values(), strict=True)))
    frames = torch.randn(2, 9, WIDTH)
    output, _ = ours(frames, torch.tensor([9, 9]))
    torch.testing.assert_close(output, layers(frames.reshape(2, 3, 3 * WIDTH)), atol=1e-6, rtol=1e-5)


def test_small_initialisation():
    torch.manual_seed(0)
    projector = MlpProjector(400, 1000, 300, 2)
    assert float(projector.linear_1.weight.detach().std()) == pytest.approx((2 / (5 * 800)) ** 0.5, rel=0.02)
    assert float(projector.linear_2.weight.detach().std()) == pytest.approx((2 / (5 * 1000)) ** 0.5, rel=0.02)
    assert not projector.linear_1.bias.any()


def test_linear_is_that_of_torch():
    torch.manual_seed(0)
    ours = make("linear", 3)
    frames = torch.randn(2, 9, WIDTH)
    output, _ = ours(frames, torch.tensor([9, 9]))
    norm = nn.RMSNorm(3 * WIDTH, eps=1e-6)
    expected = nn.functional.linear(0.4 * norm(frames.reshape(2, 3, 3 * WIDTH)), ours.linear.weight, ours.linear.bias)
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-5)


def shake(module: nn.Module) -> None:
    """Weights at which no norm is 1 and no bias is 0."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


def test_transformer_layer_is_whispers_and_torchs():
    torch.manual_seed(0)
    ours = TransformerLayer(WIDTH, 3, 20)
    shake(ours)
    config = WhisperConfig(d_model=WIDTH, encoder_attention_heads=3, encoder_ffn_dim=20, attn_implementation="eager")
    whisper = WhisperEncoderLayer(config).eval()
    whisper.load_state_dict(ours.state_dict())  # by the same names
    x = torch.randn(2, 7, WIDTH)
    mask = torch.arange(7) < torch.tensor([7, 4])[:, None]
    expected = whisper(x, torch.zeros(2, 1, 1, 7).masked_fill(~mask[:, None, None], -1e9))
    torch.testing.assert_close(ours(x, mask)[mask], expected[mask], atol=1e-5, rtol=1e-4)

    theirs = nn.TransformerEncoderLayer(
        WIDTH, 3, 20, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    ).eval()
    state, attention = ours.state_dict(), "self_attn."
    bias = torch.cat([state[f"{attention}q_proj.bias"], torch.zeros(WIDTH), state[f"{attention}v_proj.bias"]])
    pairs = {"linear1": "fc1", "linear2": "fc2", "norm1": "self_attn_layer_norm", "norm2": "final_layer_norm"}
    pairs["self_attn.out_proj"] = "self_attn.out_proj"
    named = {f"{a}.{of}": state[f"{b}.{of}"] for a, b in pairs.items() for of in ("weight", "bias")}
    weight = torch.cat([state[f"{attention}{part}_proj.weight"] for part in "qkv"])
    theirs.load_state_dict(named | {"self_attn.in_proj_weight": weight, "self_attn.in_proj_bias": bias})
    torch.testing.assert_close(ours(x, mask)[mask], theirs(x, src_key_padding_mask=~mask)[mask], atol=1e-5, rtol=1e-4)


def test_transformer_around_its_layers():
    """RMSNorm, linear, positions, layers, RMSNorm, linear, on the stacked frames, with torch's own modules."""
    torch.manual_seed(0)
    ours = make("transformer", 2)
    shake(ours)
    frames = torch.randn(1, 8, WIDTH)
    hidden = nn.functional.rms_norm(frames.reshape(1, 4, 2 * WIDTH), (2 * WIDTH,), ours.ln_pre.weight, 1e-6)
    hidden = ours.linear_in(hidden) + ours.embed_positions(torch.arange(4))
    for layer in ours.layers:
        hidden = layer(hidden, None)
    expected = ours.linear_out(nn.functional.rms_norm(hidden, (WIDTH,), ours.ln_post.weight, 1e-6))
    output, _ = ours(frames, torch.tensor([8]))
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("queries", [1, 3])
def test_qformer_is_that_of_hugging_face(queries):
    """BLIP-2's, on each window by itself; the last one has two frames."""
    torch.manual_seed(0)
    ours = make("qformer", 4, queries=queries)
    shake(ours)
    reference = Blip2QFormerModel(
        Blip2QFormerConfig(
            hidden_size=HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=num_heads(HIDDEN),
            intermediate_size=4 * HIDDEN,
            encoder_hidden_size=WIDTH,
            cross_attention_frequency=1,
            layer_norm_eps=1e-5,
        )
    ).eval()
    names = {
        "self_attn.q_proj": "attention.attention.query",
        "self_attn.k_proj": "attention.attention.key",
        "self_attn.v_proj": "attention.attention.value",
        "self_attn.out_proj": "attention.output.dense",
        "self_attn_layer_norm": "attention.output.LayerNorm",
        "cross_attn.q_proj": "crossattention.attention.query",
        "cross_attn.k_proj": "crossattention.attention.key",
        "cross_attn.v_proj": "crossattention.attention.value",
        "cross_attn.out_proj": "crossattention.output.dense",
        "cross_attn_layer_norm": "crossattention.output.LayerNorm",
        "fc1": "intermediate_query.dense",
        "fc2": "output_query.dense",
        "final_layer_norm": "output_query.LayerNorm",
    }
    state = ours.state_dict()
    theirs = {
        f"encoder.layer.{layer}.{b}.{of}": state[f"layers.{layer}.{a}.{of}"]
        for (a, b), layer, of in itertools.product(names.items(), range(2), ("weight", "bias"))
    }
    theirs |= {f"layernorm.{of}": state[f"ln_queries.{of}"] for of in ("weight", "bias")}
    reference.load_state_dict(theirs)
    size = 4 * queries
    frames = torch.randn(1, 2 * size + 2, WIDTH)
    with torch.no_grad():
        heard = nn.functional.layer_norm(frames, (WIDTH,), ours.ln_pre.weight, ours.ln_pre.bias)
        expected = torch.cat(
            [
                reference(query_embeds=ours.queries[None], encoder_hidden_states=heard[:, at : at + size])[0]
                for at in range(0, frames.shape[1], size)
            ],
            1,
        )
        output, lengths = ours(frames, torch.tensor([frames.shape[1]]))
    assert lengths.tolist() == [2 * queries + 1]
    torch.testing.assert_close(output, ours.linear_out(expected)[:, : 2 * queries + 1], atol=1e-5, rtol=1e-4)


def test_convolutions_are_torchs_on_whole_groups():
    torch.manual_seed(0)
    ours = make("conv", 6)
    shake(ours)
    first, second = (ours.convolutions[index] for index in (0, 1))
    assert [(c.kernel_size, c.stride) for c in ours.convolutions] == [((4,), (2,)), ((5,), (3,))]
    frames = torch.randn(1, 12, WIDTH)
    hidden = nn.functional.rms_norm(frames, (WIDTH,), ours.ln_pre.weight, 1e-6).transpose(1, 2)
    for layer, stride in ((first, 2), (second, 3)):
        hidden = nn.functional.gelu(nn.functional.conv1d(hidden, layer.weight, layer.bias, stride=stride, padding=1))
    expected = nn.functional.rms_norm(hidden.transpose(1, 2), (HIDDEN,), ours.ln_post.weight, 1e-6)
    output, _ = ours(frames, torch.tensor([12]))
    torch.testing.assert_close(output, ours.linear_out(expected), atol=1e-5, rtol=1e-4)


def test_prime_factors_and_heads():
    assert [prime_factors(n) for n in (1, 2, 10, 12, 49)] == [[1], [2], [2, 5], [2, 2, 3], [7, 7]]
    assert [num_heads(n) for n in (2, 64, 130, 384, 768)] == [1, 1, 2, 6, 12]


# Whole models


MODELS = {
    "swiglu_v0.4": {},
    "linear": {},
    "mlp": {"downsampling": "mean"},
    "conv": {"stack_factor": 4},
    "transformer": {"num_projector_layers": 1},
    "qformer": {"num_projector_queries": 2},
    "swiglu": {"downsampling": "random"},
    "ctc_weighted": {},
    "ctc_compressed": {"stack_factor": 3},
}


def settings(tiny_models, kind: str) -> ModelConfig:
    sized = {} if kind in ("linear", "transformer") else {"projector_hidden_size": 32}
    return ModelConfig(
        language_model=str(tiny_models.llama),
        audio_encoder=str(tiny_models.whisper),
        chat_template="chatml.jinja",
        projector=kind,
        **sized,
        **MODELS[kind],
    )


def test_every_kind_is_tried():
    assert set(MODELS) == {*PROJECTORS, "swiglu_v0.4"}


@pytest.mark.parametrize("kind", MODELS)
def test_saved_and_loaded(kind, tiny_models, make_waveform, tmp_path):
    config = settings(tiny_models, kind)
    torch.manual_seed(0)
    model, processor = build_model(config).eval(), build_processor(config)
    texts, waveforms = ["<|audio|> a", "b <|audio|>"], [make_waveform(1.0, 1), make_waveform(0.41, 2)]
    batch = processor(text=texts, audio=waveforms)
    with torch.no_grad():
        expected = model(**batch).logits
    save_model(model, processor, tmp_path / "model")
    again, processor_again = load_model(tmp_path / "model")
    with torch.no_grad():
        found = again(**processor_again(text=texts, audio=waveforms)).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for name, tensor in model.multi_modal_projector.state_dict().items():
        assert torch.equal(tensor, again.multi_modal_projector.state_dict()[name]), name


def test_the_public_configuration_holds_no_key_of_ours(tiny_models, tmp_path):
    saved = {}
    for kind in ("swiglu", "mlp"):
        model = build_model(settings(tiny_models, kind).model_copy(update={"downsampling": "stack"}))
        model.save_pretrained(tmp_path / kind)
        saved[kind] = json.loads((tmp_path / kind / "config.json").read_text())
    assert set(saved["mlp"]) - set(saved["swiglu"]) == {"projector_type"}
    assert {"projector_act", "projector_ln_mid", "num_projector_layers"} <= set(saved["swiglu"])
    assert not [key for key in saved["swiglu"] if key in ("projector_type", "downsampling", "num_projector_queries")]


def test_layers_without_a_type_are_those_of_v07(tiny_models):
    """As checkpoints with `num_projector_layers` have them; names and shapes as vLLM makes them."""
    whisper = WhisperConfig(d_model=32, encoder_attention_heads=4, encoder_ffn_dim=64).to_dict()
    config = UltravoxConfig(
        whisper, {"model_type": "llama", "hidden_size": 48, "num_attention_heads": 4}, num_projector_layers=2
    )
    assert config.projector_type == "transformer"
    shapes = {name: list(p.shape) for name, p in projector_from_config(config, 32).state_dict().items()}
    assert shapes["ln_pre.weight"] == [160]
    assert shapes["linear_in.weight"] == [32, 160]
    assert shapes["embed_positions.weight"] == [1500, 32]
    assert shapes["linear_out.weight"] == [48, 32]
    reference = WhisperEncoderLayer(WhisperConfig(d_model=32, encoder_attention_heads=4, encoder_ffn_dim=64))
    for name, parameter in reference.state_dict().items():
        assert shapes[f"layers.1.{name}"] == list(parameter.shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"projector_type": "perceiver"}, "projector_type 'perceiver' is not known to this version"),
        ({"downsampling": "max"}, "downsampling 'max' is not known to this version: expected 'stack' or"),
        ({"projector_act": "relu"}, "projector_act 'relu' is not known"),
        ({"projector_type": "mlp", "num_projector_layers": 2}, "a projector of type 'mlp' cannot have 2 layers"),
        ({"projector_type": "qformer"}, "a projector of type 'qformer' cannot have 0 layers"),
    ],
)
def test_an_unknown_kind_is_refused(change, message, tiny_checkpoint):
    path = tiny_checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (tiny_checkpoint / MANIFEST_FILE).unlink()
    with pytest.raises(ModelError, match=message):
        load_model(tiny_checkpoint)


def test_a_window_beyond_the_table_is_refused():
    with pytest.raises(DataError, match="a window of 65 positions, but the projector's table has 64"):
        make("transformer", 1)(torch.zeros(1, 65, WIDTH), torch.tensor([65]))


# Configurations


STAGE = "stages: [{name: align, objective: align, max_steps: 1}]\n"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "projector: linear, projector_hidden_size: 64",
            "projector_hidden_size: 64 has no effect with projector: linear",
        ),
        ("projector: transformer, projector_hidden_size: 64", "has no effect with projector: transformer; drop it"),
        ("projector: conv, downsampling: mean", "downsampling: mean has no effect with projector: conv; drop it"),
        ("projector: qformer, downsampling: stride", "has no effect with projector: qformer"),
        ("num_projector_layers: 2", "num_projector_layers: 2 has no effect with projector: swiglu; drop it"),
        ("projector: transformer, num_projector_queries: 2", "num_projector_queries: 2 has no effect with projector"),
        ("stack_factor: 1, downsampling: mean", "downsampling: mean has no effect with stack_factor: 1; drop it"),
        ("projector: perceiver", "projector: expected "),
    ],
)
def test_options_that_do_nothing_are_refused(model, message):
    with pytest.raises(ConfigError) as caught:
        parse_config(f"{STAGE}model: {{{model}}}\n")
    (line,) = str(caught.value).splitlines()
    assert message in line


def test_a_position_longer_than_every_clip_is_refused():
    text = STAGE + "model: {stack_factor: 50}\ndata: {max_audio_seconds: 0.9, min_audio_seconds: 0.1}\n"
    with pytest.raises(ConfigError, match=r"stack_factor 50 makes one position of 1 s, more than the longest clip has"):
        parse_config(text)
    assert parse_config(text.replace("0.9", "1.0")).model.stack_factor == 50
