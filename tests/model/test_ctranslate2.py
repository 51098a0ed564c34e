import json
import struct

import numpy as np
import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from ultravox.errors import ModelError
from ultravox.model.ctranslate2 import read_ctranslate2, whisper_from_ctranslate2

TOKENS = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|translate|>", "<|transcribe|>"]
TOKENS += ["<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
CODES = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4, "bfloat16": 5}


def string(text: str) -> bytes:
    return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"


def variable(name: str, array: np.ndarray, kind: str = "") -> bytes:
    data = np.ascontiguousarray(array).tobytes()
    head = string(name) + struct.pack("<B", array.ndim) + struct.pack(f"<{array.ndim}I", *array.shape)
    return head + struct.pack("<BI", CODES[kind or str(array.dtype)], len(data)) + data


def model_bin(arrays: dict[str, np.ndarray], spec: str = "WhisperSpec", version: int = 6) -> bytes:
    head = struct.pack("<I", version) + string(spec) + struct.pack("<II", 3, len(arrays))
    tail = struct.pack("<I", 1) + string("decoder/projection/weight") + string("decoder/embeddings/weight")
    return head + b"".join(variable(name, array) for name, array in arrays.items()) + tail


def to_ctranslate2(model: WhisperForConditionalGeneration) -> dict[str, np.ndarray]:
    """The reverse of what is tested, written from the format's description."""
    state = {name: tensor.numpy() for name, tensor in model.model.state_dict().items()}
    arrays: dict[str, np.ndarray] = {"decoder/embeddings/weight": state["decoder.embed_tokens.weight"]}
    for part, heads in (("encoder", model.config.encoder_attention_heads), ("decoder", 4)):
        arrays[f"{part}/num_heads"] = np.array(heads, np.int16)
        arrays[f"{part}/position_encodings/encodings"] = state[f"{part}.embed_positions.weight"]
        arrays[f"{part}/layer_norm/gamma"] = state[f"{part}.layer_norm.weight"]
        arrays[f"{part}/layer_norm/beta"] = state[f"{part}.layer_norm.bias"]
        for layer in range(2):
            for ours, theirs in (("self_attention", "self_attn"), ("attention", "encoder_attn"), ("ffn", "final")):
                if part == "encoder" and ours == "attention":
                    continue
                source, target = f"{part}.layers.{layer}.{theirs}", f"{part}/layer_{layer}/{ours}"
                arrays[f"{target}/layer_norm/gamma"] = state[f"{source}_layer_norm.weight"]
                arrays[f"{target}/layer_norm/beta"] = state[f"{source}_layer_norm.bias"]
                for kind in ("weight", "bias"):
                    if ours == "ffn":
                        for index in (0, 1):
                            name = f"{part}.layers.{layer}.fc{index + 1}.{kind}"
                            arrays[f"{target}/linear_{index}/{kind}"] = state[name]
                        continue
                    query, value, out = (state[f"{source}.{name}_proj.{kind}"] for name in ("q", "v", "out"))
                    key = state[f"{source}.k_proj.weight"] if kind == "weight" else np.zeros_like(query)
                    parts = [[query, key, value], [out]] if ours == "self_attention" else [[query], [key, value], [out]]
                    for index, stacked in enumerate(parts):
                        arrays[f"{target}/linear_{index}/{kind}"] = np.concatenate(stacked)
    for name in ("conv1", "conv2"):
        for kind in ("weight", "bias"):
            arrays[f"encoder/{name}/{kind}"] = state[f"encoder.{name}.{kind}"]
    return arrays


@pytest.fixture(scope="module")
def original() -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 4}
    config = WhisperConfig(
        d_model=16,
        encoder_ffn_dim=24,
        decoder_ffn_dim=40,
        vocab_size=50_270,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=12,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=1,
        **sizes,
    )
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter).half().float() * 0.25)
    return model


@pytest.fixture(scope="module")
def settings() -> tuple[bytes, bytes]:
    first = 50256  # of an English-only vocabulary
    config = {
        "alignment_heads": [[1, 0]],
        "lang_ids": [first + 2],
        "suppress_ids": [7, 1, 7],
        "suppress_ids_begin": [220, first, 220, first],
    }
    tokens = [{"id": first + index, "content": token} for index, token in enumerate(TOKENS)]
    return json.dumps(config).encode(), json.dumps({"added_tokens": tokens}).encode()


def test_converted_whisper_computes_the_same(original, settings) -> None:
    half = {name: array.astype(np.float16) if array.ndim else array for name, array in to_ctranslate2(original).items()}
    converted = whisper_from_ctranslate2(model_bin(half), *settings)
    mel, ids = torch.randn(2, 8, 40), torch.tensor([[1, 5, 9], [1, 2, 3]])
    with torch.no_grad():
        expected = original(input_features=mel, decoder_input_ids=ids).logits
        got = converted(input_features=mel, decoder_input_ids=ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)  # the weights fit float16 exactly
    assert converted.proj_out.weight is converted.model.decoder.embed_tokens.weight
    assert converted.config.encoder_attention_heads == 2
    assert converted.config.decoder_ffn_dim == 40


def test_generation_settings(original, settings) -> None:
    english = whisper_from_ctranslate2(model_bin(to_ctranslate2(original)), *settings).generation_config
    assert english.is_multilingual is False
    assert english.decoder_start_token_id == 50257
    assert english.suppress_tokens == [1, 7]
    assert english.begin_suppress_tokens == [220, 50256]
    tokens = json.loads(settings[1])["added_tokens"]
    moved = json.dumps({"added_tokens": [{**token, "id": token["id"] + 1} for token in tokens]}).encode()
    config = json.dumps({**json.loads(settings[0]), "lang_ids": [50259]}).encode()
    multilingual = whisper_from_ctranslate2(model_bin(to_ctranslate2(original)), config, moved).generation_config
    assert multilingual.is_multilingual is True
    assert multilingual.lang_to_id == {"<|en|>": 50259}
    assert multilingual.task_to_id == {"translate": 50260, "transcribe": 50261}


def test_bfloat16_and_aliases() -> None:
    data = struct.pack("<I", 6) + string("WhisperSpec") + struct.pack("<II", 3, 1)
    data += variable("decoder/embeddings/weight", np.array([0x3F80, 0xC000], np.uint16), "bfloat16")
    data += struct.pack("<I", 1) + string("decoder/projection/weight") + string("decoder/embeddings/weight")
    variables = read_ctranslate2(data)
    assert variables["decoder/projection/weight"].tolist() == [1.0, -2.0]


def test_malformed_files(original, settings) -> None:
    arrays = to_ctranslate2(original)
    good = model_bin(arrays)
    with pytest.raises(ModelError, match="ends too early"):
        read_ctranslate2(good[: len(good) // 2])
    with pytest.raises(ModelError, match="3 bytes after its end"):
        read_ctranslate2(good + b"abc")
    with pytest.raises(ModelError, match="file version 5"):
        read_ctranslate2(model_bin(arrays, version=5))
    with pytest.raises(ModelError, match="expected a WhisperSpec"):
        read_ctranslate2(model_bin(arrays, spec="TransformerSpec"))
    with pytest.raises(ModelError, match="quantised to integers"):
        whisper_from_ctranslate2(
            model_bin({**arrays, "encoder/conv1/weight_scale": np.ones(16, np.float32)}), *settings
        )
    name = "encoder/layer_0/self_attention/linear_0/bias"
    biased = model_bin({**arrays, name: np.ones_like(arrays[name])})
    with pytest.raises(ModelError, match="key projection has no bias"):
        whisper_from_ctranslate2(biased, *settings)
