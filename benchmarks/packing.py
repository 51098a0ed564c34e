"""What packing is worth in a tuning step on a CPU: SmolLM2-135M with LoRA on all layers, lengths of asterisk-en.

    python benchmarks/packing.py [--tokens 1200] [--steps 8]

A step is forward and backward; the loss is on a clip's own transcript. Every way of making batches takes the same
number of steps in turn with the others, on one core, and the core's own seconds are counted: what else the machine does
hits all alike. Batches hold clips of like length, as training makes them, or clips as they come (`any`), as a loader
without buckets would. The general way is what any language model gets (attention by SDPA, with masks of several short
rows); our kernels are Llama's. Result: benchmarks/results/packing.json.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ultravox.audio.lengths import num_audio_tokens
from ultravox.config.model import LoraConfig
from ultravox.data.plan import plan_batches
from ultravox.data.prompts import render
from ultravox.data.sources import load_clips
from ultravox.data.templates import PromptTemplate
from ultravox.model.adapters import add_lora
from ultravox.model.factory import load_language_model, load_tokenizer
from ultravox.model.fast_attention import use_fast_attention, use_short_attention
from ultravox.model.fast_mlp import use_fast_mlps
from ultravox.model.kernels import use_fast_linears, use_fast_norms
from ultravox.model.packing import Packer, find_packer
from ultravox.objectives.cross_entropy import cross_entropy
from ultravox.training.memory import keep_freed_memory

RESULTS = Path(__file__).parent / "results" / "packing.json"
MODEL = "smollm2-135m-instruct"
FRAMES_PER_SECOND, STACK_FACTOR = 50, 5


def clip_lengths(source: str, tokenizer: Any) -> np.ndarray:
    """Tokens of each clip's conversation, audio included, and of its answer: [clip, 2]."""
    rows = []
    template = PromptTemplate("transcription")
    for clip in load_clips(source, "train"):
        ids, supervised = render(tokenizer, template.messages(clip))
        audio = num_audio_tokens(round(clip.duration * FRAMES_PER_SECOND), STACK_FACTOR)
        rows.append((len(ids) - 1 + audio, sum(supervised)))
    return np.array(rows)


def plan_any(lengths: np.ndarray, budget: int, *, count_padding: bool) -> list[np.ndarray]:
    """Clips in random order, as many in a batch as the budget allows."""
    batches: list[list[int]] = [[]]
    for item in np.random.default_rng(0).permutation(len(lengths)).tolist():
        chosen = lengths[[*batches[-1], item]]
        if batches[-1] and (chosen.max() * len(chosen) if count_padding else chosen.sum()) > budget:
            batches.append([])
        batches[-1].append(item)
    return [np.array(batch) for batch in batches]


@dataclass(slots=True)
class Variant:
    """One way of making batches, and what it has cost."""

    name: str
    model: Any
    packer: Packer | None
    batches: list[np.ndarray]
    seconds: float = 0.0
    tokens: int = 0
    positions: int = 0

    def step(self, rows: np.ndarray, seed: int, *, counted: bool) -> None:
        """Forward and backward pass of clips of these lengths, [clip, 2]."""
        inputs, labels, mask = random_batch(rows, self.model.config.hidden_size, seed)
        self.model.zero_grad(set_to_none=True)
        start = time.process_time()
        arguments: dict[str, Any] = {}
        if self.packer is not None:
            packed = self.packer.pack(mask)
            arguments, labels = packed.arguments, packed.place_labels(labels, mask)
            inputs = packed.place(inputs[mask])
        hidden = self.model.get_decoder()(inputs_embeds=inputs, use_cache=False, **arguments).last_hidden_state
        cross_entropy(hidden, labels, self.model.get_output_embeddings().weight)[0].backward()
        if counted:
            self.seconds += time.process_time() - start
            self.tokens += int(mask.sum())
            self.positions += inputs.shape[0] * inputs.shape[1]


def random_batch(rows: np.ndarray, hidden: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, labels and mask of right-padded clips."""
    generator = torch.Generator().manual_seed(seed)
    lengths, answers = (torch.from_numpy(column)[:, None] for column in rows.T)
    places = torch.arange(int(lengths.max()))
    mask = places < lengths
    labels = torch.randint(0, 1000, mask.shape, generator=generator).masked_fill(~mask, -100)
    labels.masked_fill_(places < lengths - answers, -100)
    inputs = torch.randn(*mask.shape, hidden, generator=generator) * 0.1
    return inputs.requires_grad_(True), labels, mask


def load(*, our_attention: bool) -> Any:
    """SmolLM2 with adapters, in training mode; with SDPA it stands for models whose attention is not Llama's."""
    model = load_language_model(MODEL).requires_grad_(False)
    defaults = LoraConfig(rank=16)
    add_lora(model, defaults.rank, defaults.effective_alpha, defaults.target_modules)
    for use in (use_fast_linears, use_fast_norms, use_fast_mlps):
        use(model)
    if our_attention:
        use_short_attention(model)
        use_fast_attention(model)
    return model.train()


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1200, help="budget of a batch (default %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="steps of each way (default %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = clip_lengths("asterisk-en", load_tokenizer(MODEL))
    lengths, budget = rows[:, 0], options.tokens
    plain, fast = load(our_attention=False), load(our_attention=True)
    general, kernels = find_packer(plain, "on"), find_packer(fast, "auto")
    like = {padding: plan_batches(lengths, budget, 0, 0, count_padding=padding) for padding in (True, False)}
    mixed = {padding: plan_any(lengths, budget, count_padding=padding) for padding in (True, False)}
    variants = [
        Variant("padded, like lengths", plain, None, like[True]),
        Variant("packed in general, like lengths", plain, general, like[False]),
        Variant("padded, any lengths", plain, None, mixed[True]),
        Variant("packed in general, any lengths", plain, general, mixed[False]),
        Variant("our kernels, padded, like lengths", fast, None, like[True]),
        Variant("our kernels, packed, like lengths", fast, kernels, like[False]),
    ]
    for step in range(options.steps + 1):  # the first one fetches memory and compiles kernels
        for variant in variants:
            variant.step(rows[variant.batches[step % len(variant.batches)]], step, counted=step > 0)
    base = variants[0].seconds / variants[0].tokens
    table = {
        variant.name: {
            "core_seconds_per_step": round(variant.seconds / options.steps, 3),
            "tokens_per_step": round(variant.tokens / options.steps),
            "padding_share": round(1 - variant.tokens / variant.positions, 4),
            "tokens_per_core_second": round(variant.tokens / variant.seconds),
            "speed_to_padded": round(base * variant.tokens / variant.seconds, 3),
        }
        for variant in variants
    }
    spread = {"mean": round(float(lengths.mean()), 1), "least": int(lengths.min()), "most": int(lengths.max())}
    settings = {"model": MODEL, "threads": 1, "max_batch_tokens": budget, "steps": options.steps}
    RESULTS.write_text(json.dumps({"settings": settings, "lengths": spread, "ways": table}, indent=1) + "\n")
    print(f"{'':34} s/step  padding  tokens/s  to padded")
    for name, row in table.items():
        seconds, padding, rate, speed = (row[key] for key in list(row) if key != "tokens_per_step")
        print(f"{name:34} {seconds:6.2f}  {padding:6.1%}  {rate:8}  {speed:9.2f}")


if __name__ == "__main__":
    main()
