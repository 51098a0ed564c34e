"""Checked shapes, and a tiny model that everything can be tried on in milliseconds."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook

# Before anything imports them: every shape in a signature of these packages is now checked at run time.
install_import_hook(["ultravox.audio.features", "ultravox.model", "ultravox.inference"], "beartype.beartype")

from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import numpy as np
import pytest


def _not_fetched(error: Exception) -> NoReturn:
    """A test whose model or data cannot be had is skipped on a laptop without a network, and fails in CI."""
    if os.environ.get("CI"):
        pytest.fail(f"in CI everything can be fetched, but: {error}")
    pytest.skip(str(error))


@pytest.fixture(scope="session")
def not_fetched():
    """`_not_fetched`, for tests."""
    return _not_fetched


@pytest.fixture(scope="session")
def write_three_hours():
    """A function that writes a wav file of three hours, sparse, so that it takes no room."""
    import struct
    import wave

    def write(path: Path) -> None:
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 1, 8000, 0, "NONE", ""))
            file.writeframes(b"\x80")
        num_bytes = 3 * 3600 * 8000
        header = bytearray(path.read_bytes()[:44])
        header[4:8], header[40:44] = struct.pack("<I", num_bytes + 36), struct.pack("<I", num_bytes)
        with path.open("wb") as file:
            file.write(header)
            file.truncate(44 + num_bytes)

    return write


@pytest.fixture(scope="session")
def tiny_tokenizer_folder(tmp_path_factory) -> Path:
    """A byte tokenizer with ChatML's special tokens, 259 ids, in a folder of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tokenizer")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {
        token: index for index, token in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>"
    )
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory, tiny_tokenizer_folder) -> SimpleNamespace:
    """Folders of random models as `from_pretrained` takes them: `whisper`, `llama`, `hubert`."""
    import shutil

    import torch
    from transformers import (
        HubertConfig,
        HubertModel,
        LlamaConfig,
        LlamaForCausalLM,
        Wav2Vec2FeatureExtractor,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    special = {"pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
    whisper = WhisperForConditionalGeneration(
        WhisperConfig(
            d_model=32,
            encoder_layers=2,
            encoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_layers=1,
            decoder_attention_heads=4,
            decoder_ffn_dim=64,
            vocab_size=64,
            decoder_start_token_id=1,
            suppress_tokens=None,
            begin_suppress_tokens=None,
            **special,
        )
    )
    whisper.save_pretrained(root / "whisper")
    WhisperFeatureExtractor().save_pretrained(root / "whisper")
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=259,
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=96,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            **special,
        )
    )
    # random weights of the usual size make every next token alike; these make differences that tests can see
    with torch.no_grad():
        for parameter in llama.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    llama.save_pretrained(root / "llama")
    shutil.copytree(tiny_tokenizer_folder, root / "llama", dirs_exist_ok=True)
    hubert = HubertModel(
        HubertConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            conv_dim=(16,) * 7,
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2,
        )
    )
    hubert.save_pretrained(root / "hubert")
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(root / "hubert")
    return SimpleNamespace(root=root, whisper=root / "whisper", llama=root / "llama", hubert=root / "hubert")


@pytest.fixture(scope="session")
def tiny_model_config(tiny_models):
    """The model section of a run config that names the tiny folders."""
    from ultravox.config.model import ModelConfig

    return ModelConfig(
        language_model=str(tiny_models.llama),
        audio_encoder=str(tiny_models.whisper),
        projector_hidden_size=64,
        chat_template="chatml.jinja",
    )


@pytest.fixture
def tiny_model(tiny_model_config):
    """A model of random towers, in evaluation mode."""
    import torch

    from ultravox.model.factory import build_model

    torch.manual_seed(1)
    return build_model(tiny_model_config).eval()


@pytest.fixture
def tiny_processor(tiny_model_config):
    """The processor of `tiny_model`."""
    from ultravox.model.factory import build_processor

    return build_processor(tiny_model_config)


@pytest.fixture
def tiny_checkpoint(tiny_model, tiny_processor, tmp_path) -> Path:
    """`tiny_model` as a saved folder."""
    from ultravox.model.factory import save_model

    folder = tmp_path / "checkpoint"
    save_model(tiny_model, tiny_processor, folder)
    return folder


@pytest.fixture
def make_waveform():
    """`make_waveform(seconds, seed)` → noise, float32 [sample]."""

    def make(seconds: float, seed: int = 0) -> np.ndarray:
        noise = np.random.default_rng(seed).standard_normal(round(seconds * 16000))
        return (0.1 * noise).astype(np.float32)

    return make


@pytest.fixture
def speech_server():
    """A server with OpenAI's two endpoints on this machine."""
    import sys

    sys.path.insert(0, str(Path(__file__).parent))
    try:
        from speech_server import serving
    finally:
        sys.path.pop(0)
    with serving() as server:
        yield server
