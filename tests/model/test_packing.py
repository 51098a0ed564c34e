"""Sequences that share a row train as they do apart in every kind of model, and nothing passes between them."""

from functools import partial

import pytest
import torch
from torch import nn
from transformers import (
    BambaConfig,
    BloomConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ultravox.errors import ModelError
from ultravox.model import packing as module
from ultravox.model.fast_attention import use_fast_attention, use_short_attention
from ultravox.model.packing import BLOCK_MASK_ATTENTION, PackedRows, Packer, _slots, find_packer, use_block_masks
from ultravox.objectives.cross_entropy import cross_entropy
from ultravox.tokens import IGNORE_INDEX

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    **SPECIAL,
}
PLAIN = {
    name: size for name, size in SIZES.items() if name not in ("intermediate_size", "num_key_value_heads", "head_dim")
}
LENGTHS = [11, 3, 17, 1, 9]

FAMILIES = {
    "llama": (LlamaConfig(**SIZES), "positions"),
    "qwen3": (Qwen3Config(**SIZES), "positions"),
    "mistral with a window": (MistralConfig(**SIZES, sliding_window=4), "positions"),
    "gemma with windows in some layers": (
        Gemma3TextConfig(**SIZES, sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
        "positions",
    ),
    "mixtral": (MixtralConfig(**SIZES, num_local_experts=4), "positions"),
    "gpt2": (GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4), "positions"),
    "opt": (OPTConfig(**PLAIN, ffn_dim=64, word_embed_proj_dim=32), "masks"),
    "falcon": (FalconConfig(**PLAIN), "masks"),
    "gpt-oss with windows and sinks": (GptOssConfig(**SIZES, num_local_experts=4, sliding_window=4), "masks"),
}


def build(config):
    """A model whose weights are large enough that attention and positions show."""
    torch.manual_seed(0)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.2)
    return model


def batch(width=32):
    """Embeddings of padded sequences, with a gradient, labels at all their tokens, and their mask."""
    torch.manual_seed(1)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    labels = torch.randint(60, mask.shape).masked_fill(~mask, IGNORE_INDEX)
    return (torch.randn(*mask.shape, width) * 0.5).requires_grad_(True), labels, mask


def apart(model, inputs, labels):
    """Loss of each sequence, [sequence]; alone, without padding."""
    losses = []
    for row, length in enumerate(LENGTHS):
        hidden = model.get_decoder()(inputs_embeds=inputs[row : row + 1, :length], use_cache=False).last_hidden_state
        losses.append(cross_entropy(hidden, labels[row : row + 1, :length], model.get_output_embeddings().weight)[0])
    return torch.stack(losses)


def together(packer, model, inputs, labels, mask):
    """Loss and number of supervised positions of a packed batch."""
    packed = packer.pack(mask)
    rows = packed.place(inputs[mask])
    hidden = packer.decoder(inputs_embeds=rows, use_cache=False, **packed.arguments).last_hidden_state
    return cross_entropy(hidden, packed.place_labels(labels, mask), model.get_output_embeddings().weight)


@pytest.fixture(params=[1, 2], ids=["one row", "two rows"])
def num_rows(request, monkeypatch):
    widths = {1: (1000, 1000), 2: (20, 20)}[request.param]
    monkeypatch.setattr(module, "DENSE_WIDTHS", widths)
    return request.param


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences_train_as_they_do_apart(family, num_rows):
    config, way = FAMILIES[family]
    model = build(config)
    packer = find_packer(model, "on")
    assert packer.way == way
    inputs, labels, mask = batch()
    assert packer.pack(mask).shape == {1: (1, 48), 2: (2, 24)}[num_rows]
    total, count = together(packer, model, inputs, labels, mask)
    assert count == sum(LENGTHS) - len(LENGTHS)  # no sequence's end predicts another's beginning
    expected = apart(model, inputs, labels)
    torch.testing.assert_close(total, expected.sum(), rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(total, inputs)
    (reference,) = torch.autograd.grad(expected.sum(), inputs)
    torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5 * float(reference.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_sequence_has_a_gradient_from_anothers_loss(family, num_rows):
    model = build(FAMILIES[family][0])
    packer = find_packer(model, "on")
    inputs, labels, mask = batch()
    for row in range(len(LENGTHS)):
        alone = labels.masked_fill(torch.arange(len(LENGTHS))[:, None] != row, IGNORE_INDEX)
        total, count = together(packer, model, inputs, alone, mask)
        assert count == LENGTHS[row] - 1
        (gradient,) = torch.autograd.grad(total, inputs)
        felt = gradient.abs().amax((1, 2))
        assert torch.equal(felt > 0, torch.arange(len(LENGTHS)) == (row if count else -1))


def test_our_kernels_give_the_same_loss():
    model = build(LlamaConfig(**SIZES))
    inputs, labels, mask = batch()
    expected = apart(model, inputs, labels).sum()
    (reference,) = torch.autograd.grad(expected, inputs)
    use_short_attention(model)
    use_fast_attention(model)
    packer = find_packer(model.train(), "auto")
    assert (packer.way, packer.plan_mode) == ("kernels", "packed")
    total, _ = together(packer, model, inputs, labels, mask)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.autograd.grad(total, inputs)[0], reference, rtol=1e-4, atol=1e-5)


def test_our_attention_takes_the_masks_of_transformers():
    """Mistral and Qwen on a CPU train with `short_attention`, but not with packed rows of our own."""
    model = build(MistralConfig(**SIZES, sliding_window=4))
    inputs, labels, mask = batch()
    expected = apart(model, inputs, labels).sum()
    use_short_attention(model)
    use_fast_attention(model)
    assert find_packer(model, "auto") is None
    packer = find_packer(model, "on")
    assert (packer.way, packer.plan_mode) == ("positions", "best_fit")
    torch.testing.assert_close(together(packer, model, inputs, labels, mask)[0], expected, rtol=1e-5, atol=0)


def test_off_is_off_and_auto_is_for_our_kernels():
    model = build(LlamaConfig(**SIZES))
    assert find_packer(model, "auto") is None
    use_fast_attention(model)
    assert find_packer(model, "off") is None
    assert find_packer(model, "on").way == "kernels"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1, state_size=4), "one sees another"),
        (
            BambaConfig(**SIZES, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, attn_layer_indices=[1]),
            "one sees another",
        ),
        (BloomConfig(vocab_size=60, hidden_size=32, n_layer=1, n_head=4), "one sees another"),
    ],
    ids=["mamba", "mamba and attention", "bloom"],
)
def test_a_model_that_cannot_is_refused_in_one_line(config, reason):
    torch.manual_seed(0)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    with pytest.raises(ModelError, match=rf"{type(model).__name__} cannot keep packed clips apart .*{reason}") as error:
        find_packer(model, "on")
    assert str(error.value).endswith("set packing to auto or off")
    assert "\n" not in str(error.value)


def test_positions_that_go_on_are_found_out():
    class Counting(nn.Embedding):
        def forward(self, positions):
            return super().forward(torch.arange(positions.shape[1])[None])

    model = build(GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=4))
    model.transformer.wpe.__class__ = Counting
    with pytest.raises(ModelError, match="positions do not start anew"):
        find_packer(model, "on")


def test_trying_a_model_out_leaves_it_as_it_was():
    model = build(GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=4)).requires_grad_(True).train()
    model.transformer.h[0].eval()
    modes = [child.training for child in model.modules()]
    state = torch.get_rng_state()
    assert find_packer(model, "on") is not None
    assert [child.training for child in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def positions(lengths):
    return torch.cat([torch.arange(length) for length in lengths])


@pytest.mark.parametrize("hidden_size", [None, 576, 4096])
def test_rows_are_evenly_full_and_every_token_has_a_place(hidden_size):
    lengths = torch.randint(20, 90, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    slots, (rows, width) = _slots(lengths, hidden_size)
    assert len(slots.unique()) == len(slots) == sum(lengths)
    assert int(slots.max()) < rows * width < 1.03 * sum(lengths)
    assert rows * width % 8 == 0
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    for start, length in zip(slots[starts].tolist(), lengths, strict=True):
        assert start // width == (start + length - 1) // width  # none goes on in another row
    assert torch.equal(slots - slots[starts].repeat_interleave(torch.tensor(lengths)), positions(lengths))
    if hidden_size is None:
        assert rows == 1
        assert torch.equal(slots, torch.arange(len(slots)))


@pytest.mark.parametrize(
    ("lengths", "hidden_size", "shape"),
    [
        ([300, 5, 5], 576, (1, 312)),  # no narrower than the longest sequence
        ([170] * 7, 576, (7, 176)),  # where no two fit without much to fill, one to a row
        ([60] * 20, 32, (7, 184)),  # a small model's attention is most of its work: narrow rows
        ([60] * 20, 2048, (5, 240)),  # a large one's is not: little to fill
    ],
)
def test_rows_cost_little(lengths, hidden_size, shape):
    assert _slots(lengths, hidden_size)[1] == shape


def test_labels_stand_at_their_tokens_but_for_each_first():
    packed = PackedRows(torch.tensor([0, 1, 2, 3, 4]), (1, 6), {})
    mask = torch.tensor([[True, True, True], [True, True, False]])
    labels = torch.tensor([[5, 6, 7], [8, 9, IGNORE_INDEX]])
    expected = [[IGNORE_INDEX, 6, 7, IGNORE_INDEX, 9, IGNORE_INDEX]]
    assert packed.place_labels(labels, mask).tolist() == expected
    assert labels[0, 0] == 5


def varlen_attention(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, **others):
    """What flash attention's function of this name computes, [token, head, width], one sequence after the other."""
    assert causal
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert cu_seqlens_q.dtype == torch.int32
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    window = others.get("window_size", (max_seqlen_q, 0))[0]
    parts = []
    for start, stop in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True):
        distance = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
        mask = (distance >= 0) & (distance <= window)
        query, key, value = (x[start:stop].transpose(0, 1)[None] for x in (q, k, v))
        attended = nn.functional.scaled_dot_product_attention(
            query, key, value, mask, scale=others["softmax_scale"], enable_gqa=True
        )
        parts.append(attended[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("config", [LlamaConfig(**SIZES), MistralConfig(**SIZES, sliding_window=4)])
def test_flash_attention_is_told_where_sequences_end(config, monkeypatch):
    """Its kernels need a GPU; here all of transformers' way to them runs, to a function that computes the same."""
    import transformers.modeling_flash_attention_utils as flash

    supports = dict.fromkeys(("window_size", "max_seqlen_q", "max_seqlen_k"), True)
    supports |= dict.fromkeys(("dropout_p", "deterministic", "softcap", "s_aux", "cache_seqlens", "block_table"), False)
    process = partial(flash._process_flash_attention_kwargs, supports_mapping=supports)
    functions = ((None, varlen_attention, None, None, None), (process, None))
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda name: functions)
    model = build(config)
    inputs, labels, mask = batch()
    expected = apart(model, inputs, labels).sum()
    model.config._attn_implementation = "flash_attention_2"
    packer = Packer(model.get_decoder(), "positions")
    packed = packer.pack(mask)
    assert packed.shape == (1, 48)
    assert packed.arguments["cu_seq_lens_q"].tolist()[:6] == [0, 11, 14, 31, 32, 41]
    total, _ = together(packer, model, inputs, labels, mask)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)


@pytest.fixture
def plain_flex(monkeypatch):
    """Flex attention without the compiler, which takes half a minute; on a CPU it has no backward pass either way."""
    from torch.nn.attention import flex_attention as flex
    from transformers import masking_utils
    from transformers.integrations import flex_attention as integration

    def attend(query, key, value, training=False, **arguments):
        used.append(type(arguments["block_mask"]))
        return flex.flex_attention(query, key, value, **arguments)

    def create(**arguments):
        return flex.create_block_mask(**{**arguments, "_compile": False})

    used = []
    monkeypatch.setattr(integration, "compile_friendly_flex_attention", attend)
    monkeypatch.setattr(masking_utils, "create_block_mask", create)
    return used


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["flex_attention", BLOCK_MASK_ATTENTION])
@pytest.mark.parametrize("kind", ["positions", "masks"])
@torch.no_grad()
def test_flex_attention_computes_the_same(plain_flex, name, kind):
    sizes = {**SIZES, "head_dim": 16}
    model = build(MistralConfig(**sizes, sliding_window=4))
    inputs, labels, mask = batch()
    expected = apart(model, inputs, labels).sum()
    use_block_masks(model)
    assert model.config._attn_implementation == "sdpa"  # a CPU's
    if name == BLOCK_MASK_ATTENTION:
        use_block_masks(model, devices=("cpu",))
    else:
        model.set_attn_implementation(name)
    assert model.config._attn_implementation == name
    packer = Packer(model.get_decoder(), kind)
    total, _ = together(packer, model, inputs, labels, mask)
    assert len(plain_flex) == 2
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)


def test_block_masks_are_for_packed_rows_only(plain_flex):
    model = build(MistralConfig(**{**SIZES, "head_dim": 16, "eos_token_id": None}, sliding_window=4))
    prompt = torch.randint(1, 60, (2, 9))
    attention_mask = torch.ones_like(prompt)
    attention_mask[0, :3] = 0
    expected = model.generate(prompt, attention_mask=attention_mask, max_new_tokens=6, do_sample=False)
    use_block_masks(model, devices=("cpu",))
    assert model.config._attn_implementation == BLOCK_MASK_ATTENTION
    generated = model.generate(prompt, attention_mask=attention_mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(generated, expected)
    inputs, labels, _ = batch()
    apart(model, inputs, labels).sum().backward()  # sequences alone have no mask of blocks, but a backward pass
    assert plain_flex == []


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES),
        LlamaConfig(**{**SIZES, "head_dim": 16}, attention_dropout=0.1),
        GPT2Config(vocab_size=60, n_embd=64, n_layer=1, n_head=4),
    ],
    ids=["narrow heads", "dropout", "GPT-2's dropout"],
)
def test_a_model_that_flex_attention_does_not_suit_stays_with_sdpa(config):
    model = build(config)
    use_block_masks(model, devices=("cpu",))
    assert model.config._attn_implementation == "sdpa"


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="flex and flash attention train on a GPU only")


@needs_cuda
@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**{**SIZES, "head_dim": 16}),
        MistralConfig(**{**SIZES, "head_dim": 16}, sliding_window=4),
        GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.0),
        OPTConfig(**{**PLAIN, "num_attention_heads": 2}, ffn_dim=64, word_embed_proj_dim=32),
    ],
)
def test_on_a_gpu_packed_sequences_train_as_they_do_apart(config):
    model = build(config).cuda()
    inputs, labels, mask = (tensor.detach().cuda() for tensor in batch())
    inputs.requires_grad_(True)
    expected = apart(model, inputs, labels).sum()
    (reference,) = torch.autograd.grad(expected, inputs)
    packer = find_packer(model, "on")
    total, _ = together(packer, model, inputs, labels, mask)
    torch.testing.assert_close(total, expected, rtol=1e-3, atol=0)  # TF32
    (gradient,) = torch.autograd.grad(total, inputs)
    torch.testing.assert_close(gradient, reference, rtol=1e-2, atol=1e-3 * float(reference.abs().max()))
    total, _ = together(
        packer, model, inputs, labels.index_fill(0, torch.tensor([1], device="cuda"), IGNORE_INDEX), mask
    )
    assert not torch.autograd.grad(total, inputs)[0][1].any()


@needs_cuda
def test_on_a_gpu_flash_attention_keeps_sequences_apart():
    pytest.importorskip("flash_attn")
    model = build(MistralConfig(**{**SIZES, "head_dim": 16}, sliding_window=4)).cuda().bfloat16()
    model.set_attn_implementation("flash_attention_2")
    packer = find_packer(model, "on")
    assert "cu_seq_lens_q" in packer.pack(batch()[2].cuda()).arguments
