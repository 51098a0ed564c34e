"""A tiny language model that has learnt to repeat the words it is given: a fresh one could not learn from audio."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tiny_run import WORDS, save_tiny_models
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, WhisperModel

STEPS, BATCH = 250, 32
TEXTS = ("<|im_start|>user\n{said}Transcribe<|im_end|>\n<|im_start|>assistant\n", "{said}<|im_end|>")


def save_taught_models(folder: Path) -> tuple[Path, Path]:
    """Folders of a language model and a Whisper, always the same ones."""
    llm, whisper = save_tiny_models(folder)
    tokenizer = AutoTokenizer.from_pretrained(llm)
    torch.manual_seed(3)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            initializer_range=0.1,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    _teach(model, tokenizer)
    model.save_pretrained(llm)
    encoder = WhisperModel.from_pretrained(whisper)
    with torch.no_grad():  # random weights of the usual size make every tone sound alike
        for parameter in encoder.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    encoder.save_pretrained(whisper)
    return llm, whisper


def _teach(model: LlamaForCausalLM, tokenizer) -> None:
    """To write after the prompt the words that stand in it."""
    random = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=STEPS)
    for _ in range(STEPS):
        ids = torch.zeros(BATCH, 40, dtype=torch.long)
        labels = torch.full((BATCH, 40), -100)
        for row in range(BATCH):
            said = " ".join(random.choice(WORDS, size=random.integers(2, 5)))
            prompt, answer = (tokenizer.encode(text.format(said=said), add_special_tokens=False) for text in TEXTS)
            whole = torch.tensor([*prompt, *answer])[:40]
            ids[row, : len(whole)] = whole
            labels[row, len(prompt) : len(whole)] = whole[len(prompt) :]
        logits = model(input_ids=ids).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.taught_loss = loss.item()
