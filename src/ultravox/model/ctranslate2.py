"""Whisper weights from a CTranslate2 ``model.bin`` into Hugging Face's ``WhisperForConditionalGeneration``.

The file is little endian: uint32 version; strings are a uint16 length that counts a final NUL, then the bytes; spec
name, uint32 revision, uint32 number of variables; each variable is its name, uint8 rank, uint32 dimensions, uint8 type,
uint32 number of bytes, data; then uint32 number of aliases, each two names.
(CTranslate2, python/ctranslate2/specs/model_spec.py)
"""

import json
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ultravox.errors import ModelError

if TYPE_CHECKING:
    from transformers import GenerationConfig, WhisperConfig

FILE_VERSION = 6
# bfloat16 (5) is read as its 16 bits and widened: numpy has no such type.
DTYPES = {0: "<f4", 1: "i1", 2: "<i2", 3: "<i4", 4: "<f2", 5: "<u2"}
BFLOAT16 = 5
ENGLISH_END_OF_TEXT = 50256  # <|endoftext|> of English-only models; 50257 in multilingual ones


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.offset = data, 0

    def take(self, size: int) -> bytes:
        if self.offset + size > len(self.data):
            raise ModelError(f"CTranslate2 file ends too early: {size} more bytes expected at byte {self.offset}")
        self.offset += size
        return self.data[self.offset - size : self.offset]

    def integer(self, kind: str) -> int:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def string(self) -> str:
        return self.take(self.integer("H")).rstrip(b"\0").decode()


def read_ctranslate2(data: bytes) -> dict[str, np.ndarray]:
    """All variables of a ``model.bin`` by name, aliases included; float16 stays float16. ModelError when malformed."""
    reader = _Reader(data)
    if (version := reader.integer("I")) != FILE_VERSION:
        raise ModelError(f"CTranslate2 file version {version}: this program reads version {FILE_VERSION}")
    if (spec := reader.string()) != "WhisperSpec":
        raise ModelError(f"CTranslate2 file holds a {spec!r}: expected a WhisperSpec")
    reader.integer("I")  # revision of the spec
    variables: dict[str, np.ndarray] = {}
    for _ in range(reader.integer("I")):
        name = reader.string()
        shape = [reader.integer("I") for _ in range(reader.integer("B"))]
        dtype = reader.integer("B")
        if dtype not in DTYPES:
            raise ModelError(f"CTranslate2 variable {name} has the unknown type {dtype}")
        array = np.frombuffer(reader.take(reader.integer("I")), DTYPES[dtype])
        if array.size != np.prod(shape, dtype=np.int64):
            raise ModelError(f"CTranslate2 variable {name} has {array.size} values, its shape {shape} says otherwise")
        if dtype == BFLOAT16:
            array = (array.astype(np.uint32) << 16).view(np.float32)
        variables[name] = array.reshape(shape)
    for _ in range(reader.integer("I")):
        alias, target = reader.string(), reader.string()
        variables[alias] = variables[target]
    if reader.offset != len(data):
        raise ModelError(f"CTranslate2 file has {len(data) - reader.offset} bytes after its end")
    return variables


def _num_layers(variables: Mapping[str, np.ndarray], part: str) -> int:
    prefix = f"{part}/layer_"
    numbers = {name[len(prefix) :].split("/")[0] for name in variables if name.startswith(prefix)}
    return 1 + max(int(number) for number in numbers if number.isdigit())  # "norm" is there too


def whisper_config(variables: Mapping[str, np.ndarray], ids: Mapping[str, int]) -> "WhisperConfig":
    """The architecture, read off the variables' shapes. ``ids`` are special token ids (see ``special_ids``)."""
    from transformers import WhisperConfig

    num_mel_bins = variables["encoder/conv1/weight"].shape[1]
    num_frames, d_model = variables["encoder/position_encodings/encodings"].shape
    num_target_positions = variables["decoder/position_encodings/encodings"].shape[0]
    return WhisperConfig(
        vocab_size=variables["decoder/embeddings/weight"].shape[0],
        num_mel_bins=num_mel_bins,
        d_model=d_model,
        encoder_layers=_num_layers(variables, "encoder"),
        encoder_attention_heads=int(variables["encoder/num_heads"]),
        encoder_ffn_dim=variables["encoder/layer_0/ffn/linear_0/weight"].shape[0],
        decoder_layers=_num_layers(variables, "decoder"),
        decoder_attention_heads=int(variables["decoder/num_heads"]),
        decoder_ffn_dim=variables["decoder/layer_0/ffn/linear_0/weight"].shape[0],
        max_source_positions=num_frames,
        max_target_positions=num_target_positions,
        pad_token_id=ids["<|endoftext|>"],
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=ids["<|endoftext|>"],
        decoder_start_token_id=ids["<|startoftranscript|>"],
        tie_word_embeddings=True,
    )


def _attention(variables: Mapping[str, np.ndarray], source: str, target: str, fused: str) -> dict[str, np.ndarray]:
    """One attention block. Self-attention stacks q, k and v; cross-attention has q alone and stacks k and v."""
    parts: dict[str, np.ndarray] = {}
    for kind in ("weight", "bias"):
        if fused == "qkv":
            query, key, value = np.split(variables[f"{source}/linear_0/{kind}"], 3)
            output = variables[f"{source}/linear_1/{kind}"]
        else:
            query = variables[f"{source}/linear_0/{kind}"]
            key, value = np.split(variables[f"{source}/linear_1/{kind}"], 2)
            output = variables[f"{source}/linear_2/{kind}"]
        parts |= {f"q_proj.{kind}": query, f"v_proj.{kind}": value, f"out_proj.{kind}": output}
        if kind == "weight":
            parts["k_proj.weight"] = key
        elif key.any():
            raise ModelError(f"{source}: Whisper's key projection has no bias, this file has one")
    return {f"{target}.{name}": array for name, array in parts.items()}


def _norm(variables: Mapping[str, np.ndarray], source: str, target: str) -> dict[str, np.ndarray]:
    return {
        f"{target}.weight": variables[f"{source}/layer_norm/gamma"],
        f"{target}.bias": variables[f"{source}/layer_norm/beta"],
    }


def whisper_state_dict(variables: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The variables under Hugging Face's names."""
    state: dict[str, np.ndarray] = {}
    for part in ("encoder", "decoder"):
        state[f"model.{part}.embed_positions.weight"] = variables[f"{part}/position_encodings/encodings"]
        state |= _norm(variables, part, f"model.{part}.layer_norm")
        for number in range(_num_layers(variables, part)):
            source, target = f"{part}/layer_{number}", f"model.{part}.layers.{number}"
            state |= _attention(variables, f"{source}/self_attention", f"{target}.self_attn", "qkv")
            state |= _norm(variables, f"{source}/self_attention", f"{target}.self_attn_layer_norm")
            if part == "decoder":
                state |= _attention(variables, f"{source}/attention", f"{target}.encoder_attn", "kv")
                state |= _norm(variables, f"{source}/attention", f"{target}.encoder_attn_layer_norm")
            for index in (0, 1):
                for kind in ("weight", "bias"):
                    state[f"{target}.fc{index + 1}.{kind}"] = variables[f"{source}/ffn/linear_{index}/{kind}"]
            state |= _norm(variables, f"{source}/ffn", f"{target}.final_layer_norm")
    for name in ("conv1", "conv2"):
        for kind in ("weight", "bias"):
            state[f"model.encoder.{name}.{kind}"] = variables[f"encoder/{name}/{kind}"]
    state["model.decoder.embed_tokens.weight"] = variables["decoder/embeddings/weight"]
    state["proj_out.weight"] = variables["decoder/projection/weight"]
    return state


def special_ids(tokenizer_json: Mapping[str, Any]) -> dict[str, int]:
    """Special token → id, from a ``tokenizer.json``."""
    return {token["content"]: token["id"] for token in tokenizer_json["added_tokens"]}


def whisper_generation_config(settings: Mapping[str, Any], ids: Mapping[str, int]) -> "GenerationConfig":
    """What ``generate`` needs: start, end and suppressed tokens, languages, tasks, alignment heads.

    ``settings`` is the CTranslate2 ``config.json``. As in the published models, English-only ones need no language, and
    the others detect it unless ``generate(language=…)`` says.
    """
    from transformers import GenerationConfig

    # English-only models list the languages too; what tells them apart is a text vocabulary with one entry less.
    multilingual = ids["<|endoftext|>"] != ENGLISH_END_OF_TEXT
    languages = {name: number for name, number in ids.items() if number in set(settings.get("lang_ids") or [])}
    options: dict[str, Any] = {
        "decoder_start_token_id": ids["<|startoftranscript|>"],
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|endoftext|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "no_timestamps_token_id": ids["<|notimestamps|>"],
        "prev_sot_token_id": ids["<|startofprev|>"],
        "suppress_tokens": sorted(set(settings["suppress_ids"])),
        "begin_suppress_tokens": sorted(set(settings["suppress_ids_begin"])),
        "alignment_heads": settings["alignment_heads"],
        "max_initial_timestamp_index": 50,
        "max_length": 448,
        "return_timestamps": False,
        "is_multilingual": multilingual,
    }
    if multilingual:
        options["lang_to_id"] = languages
        options["task_to_id"] = {"transcribe": ids["<|transcribe|>"], "translate": ids["<|translate|>"]}
        options["task"] = "transcribe"
    return GenerationConfig(**options)


def whisper_from_ctranslate2(model_bin: bytes, config_json: bytes, tokenizer_json: bytes) -> Any:
    """A float32 ``WhisperForConditionalGeneration``, its generation config set, from the three files' contents."""
    import torch
    from transformers import WhisperForConditionalGeneration

    variables = read_ctranslate2(model_bin)
    if any(name.endswith("weight_scale") for name in variables):
        raise ModelError("this CTranslate2 model is quantised to integers: only float16, bfloat16 and float32 are read")
    ids = special_ids(json.loads(tokenizer_json))
    model = WhisperForConditionalGeneration(whisper_config(variables, ids))
    state = {
        name: torch.from_numpy(np.array(array, np.float32)) for name, array in whisper_state_dict(variables).items()
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise ModelError(f"CTranslate2 file does not fit a Whisper model: missing {missing}, unexpected {unexpected}")
    model.generation_config = whisper_generation_config(json.loads(config_json), ids)
    return model.eval()
