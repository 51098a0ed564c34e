"""A whole run in seconds: a random Whisper and Llama of a few thousand weights, and words that are tones."""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from ultravox.audio.waveform import write_waveform
from ultravox.config.schema import RunConfig
from ultravox.data.manifest import Clip, write_dataset

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
#: Every augmentation of waveforms that needs no further package.
WAVEFORM = {
    "gain_db": 6,
    "speed": 0.1,
    "noise_share": 0.5,
    "reverb_share": 0.3,
    "codec_share": 0.3,
    "codecs": ["mulaw"],
}
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tiny_models(folder: Path) -> tuple[Path, Path]:
    """Folders of a language model and a Whisper, always the same ones."""
    torch.manual_seed(7)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator([" ".join(WORDS), "user assistant Transcribe yes no"] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )
    language_model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    whisper = WhisperModel(
        WhisperConfig(
            vocab_size=64,
            d_model=32,
            encoder_layers=2,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
    )
    language_model.save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    whisper.save_pretrained(folder / "whisper")
    WhisperFeatureExtractor().save_pretrained(folder / "whisper")
    return folder / "llm", folder / "whisper"


def save_tones(folder: Path, num_clips: int = 32) -> Path:
    """A dataset of two to four words a clip, each word a tone of 0.2 s."""
    random = np.random.default_rng(5)
    (folder / "audio").mkdir(parents=True)
    clips = []
    for index in range(num_clips):
        words = random.choice(WORDS, size=random.integers(2, 5))
        time = np.arange(3200) / 16000
        tones = [0.3 * np.sin(2 * np.pi * 200 * (2 + WORDS.index(word)) * time) for word in words]
        waveform = np.concatenate(tones).astype(np.float32)
        path = folder / "audio" / f"{index:03d}.wav"
        write_waveform(path, waveform)
        duration = len(waveform) / 16000
        answer = "yes" if "one" in words else "no"
        clips.append(Clip(f"tone-{index:03d}", path, " ".join(words), duration, "tones", "CC0", answer))
    write_dataset(folder, name="tones", licence="CC0", attribution="synthetic", splits={"train": clips})
    return folder


def tiny_config(models: tuple[Path, Path], tones: Path, run_dir: Path, **changes) -> RunConfig:
    """Two stages with everything on: speeds, masks, noise, LoRA, accumulation."""
    optim = {"lr": {"projector": 3e-3, "language_model": 2e-3, "audio_encoder": 1e-3}, "warmup_steps": 3}
    augment = {"time_masks": 1, "max_time_mask_seconds": 0.1, "channel_masks": 1, "noise_std": 0.05}
    common = {"log_every": 1, "optim": optim, "augment": augment}
    content = {
        "run_dir": str(run_dir),
        "seed": 1,
        "model": {
            "language_model": str(models[0]),
            "audio_encoder": str(models[1]),
            "stack_factor": 3,
            "projector_hidden_size": 64,
            "language_model_lora": {"rank": 4},
        },
        "data": {
            "sources": [
                {"name": str(tones), "task": "transcription"},
                {"name": str(tones), "task": "answer", "max_clips": 10, "repeat": 2},
            ],
            "speeds": [1.0, 0.9],
        },
        "stages": [
            {"name": "align", "objective": "align", "max_steps": 60, "max_batch_tokens": 100, **common},
            {
                "name": "tune",
                "objective": "tune",
                "max_steps": 40,
                "max_batch_tokens": 200,
                "accumulation_steps": 2,
                **common,
            },
        ],
        "evaluation": {"num_progress_clips": 3},
        "logging": {"tensorboard": False},
        **changes,
    }
    return RunConfig.model_validate(content)
