"""Import of a Llama-architecture GGUF file: dequantised weights, tokenizer, chat template."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ultravox.errors import ModelError

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerBase

CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL
TENSOR_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# The splits before byte-pair merging, by GGUF's name for them: SmolLM splits numbers into digits.
PRE_TOKENIZERS_WITH_DIGITS = {"smollm": True, "gpt-2": False}


def _hugging_face_name(name: str) -> str:
    fixed = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    stem, kind = name.rsplit(".", 1)
    if stem in fixed:
        return f"{fixed[stem]}.{kind}"
    block, number, part = stem.split(".")
    if block != "blk" or part not in TENSOR_NAMES:
        raise ModelError(f"GGUF tensor {name} is not one of a Llama model")
    return f"model.layers.{number}.{TENSOR_NAMES[part]}.{kind}"


def _unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo llama.cpp's order of rotary pairs: it stores (even, odd) neighbours, Hugging Face the two halves."""
    return weight.reshape(num_heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _llama_config(fields: dict[str, Any], tied: bool) -> "LlamaConfig":
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=round(fields["llama.attention.layer_norm_rms_epsilon"], 12),
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings=tied,
    )


def _tokenizer(fields: dict[str, Any]) -> "PreTrainedTokenizerBase":
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    kind = (fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre"))
    if kind[0] != "gpt2" or kind[1] not in PRE_TOKENIZERS_WITH_DIGITS:
        raise ModelError(f"GGUF tokenizer {kind} is not supported: expected gpt2 with smollm or gpt-2 splits")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if PRE_TOKENIZERS_WITH_DIGITS[kind[1]]:
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    else:
        backend.pre_tokenizer = byte_level
    backend.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    special = [token for token, type_ in zip(tokens, types, strict=True) if type_ == CONTROL_TOKEN]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        model_max_length=fields["llama.context_length"],
        chat_template=fields["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
    )


def llama_from_gguf(path: str | Path) -> tuple[Any, "PreTrainedTokenizerBase"]:
    """A float32 ``LlamaForCausalLM`` and its tokenizer from a GGUF file of any quantisation that ``gguf`` can undo."""
    import torch
    from gguf import GGUFReader, dequantize
    from transformers import GenerationConfig, LlamaForCausalLM

    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields.get("general.architecture") != "llama":
        raise ModelError(f"{path} holds a {fields.get('general.architecture')!r} model: expected llama")
    config = _llama_config(fields, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    state: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        if tensor.name.endswith("attn_q.weight"):
            weight = _unpermute(weight, config.num_attention_heads)
        elif tensor.name.endswith("attn_k.weight"):
            weight = _unpermute(weight, config.num_key_value_heads)
        state[_hugging_face_name(tensor.name)] = torch.from_numpy(np.array(weight, np.float32))
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise ModelError(f"{path} does not fit a Llama model: missing {missing}, unexpected {unexpected}")
    ids = {name: getattr(config, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(**{f"{name}_token_id": number for name, number in ids.items()})
    return model.eval(), _tokenizer(fields)
