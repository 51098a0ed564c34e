"""What each of our kernels is worth in a tuning step: SmolLM2-135M with LoRA on every linear layer, on a CPU.

    python benchmarks/tuning.py [--tokens 1200] [--steps 5]

A step is forward and backward over sequences of 20 to 60 positions, the loss on a quarter of them. The variants add one
thing after the other to plain PyTorch, where each adapter is a product of its own beside its layer. The first thing is
oneDNN with what is built on its products: an adapter merged into its weight, the loss in one step with the frozen
output layer. Each line is the mean of its steps, and its share of the matrix-product rate that the machine shows right
beside it (4 N tokens FLOP for a frozen language model of N parameters, embeddings not counted).
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ultravox.config.model import LoraConfig
from ultravox.model import kernels
from ultravox.model.adapters import add_lora
from ultravox.model.factory import load_language_model
from ultravox.model.fast_attention import Packing, use_fast_attention
from ultravox.model.fast_mlp import use_fast_mlps
from ultravox.model.kernels import register_attention, use_fast_norms
from ultravox.objectives.cross_entropy import cross_entropy
from ultravox.training.flops import num_matmul_parameters
from ultravox.training.measure import matmul_flop_rate
from ultravox.training.memory import keep_freed_memory

STEPS = 5
PLAIN = "plain PyTorch"


def batch(num_tokens: int, hidden: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, labels and mask of sequences of like length, right-padded."""
    generator = torch.Generator().manual_seed(seed)
    longest = int(torch.randint(30, 60, (), generator=generator))
    lengths = torch.randint(longest - 4, longest + 1, (num_tokens // longest,), generator=generator)
    mask = torch.arange(longest) < lengths[:, None]
    labels = torch.randint(0, 1000, mask.shape, generator=generator)
    labels[(torch.arange(longest) < lengths[:, None] * 3 // 4) | ~mask] = -100
    return torch.randn(*mask.shape, hidden, generator=generator) * 0.1, labels, mask


def padded(decoder: Any, inputs: Tensor, mask: Tensor) -> Tensor:
    """Hidden states of padded sequences."""
    return decoder(inputs_embeds=inputs, use_cache=False).last_hidden_state


def packed(decoder: Any, inputs: Tensor, mask: Tensor) -> Tensor:
    """Hidden states by way of packed rows."""
    packing = Packing.of(mask)
    output = decoder(inputs_embeds=packing.pack(inputs), use_cache=False, **packing.arguments(inputs))
    return packing.unpack(output.last_hidden_state)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1200, help="positions of a batch (default %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each variant (default %(default)s)")
    arguments = parser.parse_args()
    num_tokens = arguments.tokens
    model = load_language_model("smollm2-135m-instruct").requires_grad_(False)
    defaults = LoraConfig(rank=16)
    add_lora(model, defaults.rank, defaults.effective_alpha, defaults.target_modules)
    model.train()
    head = model.get_output_embeddings().weight
    num_parameters = num_matmul_parameters(model)

    def attention() -> None:
        model.set_attn_implementation(register_attention())
        use_fast_attention(model)

    variants: list[tuple[str, Callable[[], None], Callable[[Any, Tensor, Tensor], Tensor]]] = [
        (PLAIN, lambda: None, padded),
        ("+ oneDNN, merged LoRA", lambda: None, padded),
        ("+ memory kept", keep_freed_memory, padded),
        ("+ norms", lambda: use_fast_norms(model), padded),
        ("+ SwiGLU", lambda: use_fast_mlps(model), padded),
        ("+ attention", attention, padded),
        ("+ packed rows", lambda: None, packed),
    ]
    has_onednn = kernels._HAS_ONEDNN
    print(f"{'':24} tokens/s   share of the matmul rate")
    for name, prepare, run in variants:
        prepare()
        seconds, real = 0.0, 0
        rate = matmul_flop_rate()
        kernels._HAS_ONEDNN = has_onednn and name != PLAIN  # without it, all of ours is what PyTorch offers
        for step in range(arguments.steps + 1):
            inputs, labels, mask = batch(num_tokens, model.config.hidden_size, step)
            inputs.requires_grad_(True)
            model.zero_grad(set_to_none=True)
            start = time.perf_counter()
            total, _ = cross_entropy(run(model.get_decoder(), inputs, mask), labels, head)
            total.backward()
            if step:  # the first one fetches memory and compiles kernels
                seconds, real = seconds + time.perf_counter() - start, real + int(mask.sum())
        kernels._HAS_ONEDNN = has_onednn
        rate = max(rate, matmul_flop_rate())
        print(f"{name:24} {real / seconds:8.0f}   {4 * num_parameters * real / seconds / rate:.1%}", flush=True)


if __name__ == "__main__":
    main()
