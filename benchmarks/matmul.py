"""How fast this machine multiplies float32 matrices, by PyTorch's own way and by ours; and which attention is faster.

    python benchmarks/matmul.py

Prints GFLOP/s (best of five) at the shapes of SmolLM2-135M, and milliseconds for attention over short sequences.
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from ultravox.model.kernels import matmul_transposed, short_attention

SHAPES = [(2048, 2048, 2048), (960, 576, 1536), (960, 1536, 576), (960, 576, 576), (16, 576, 1536)]
REPEATS = 5
CALLS_FLOP = 2e10  # as many calls are timed together as make this many operations


def best_seconds(function: Callable[[], object], calls: int) -> float:
    """Seconds of one call: the best of `REPEATS` rounds of `calls` calls, after one that is not counted."""
    function()
    rounds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        rounds.append((time.perf_counter() - start) / calls)
    return min(rounds)


def main() -> None:
    """Measure and print."""
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'rows x in x out':>20} {'PyTorch':>10} {'oneDNN':>10}   GFLOP/s, float32")
    for rows, inputs, outputs in SHAPES:
        x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
        calls = max(1, int(CALLS_FLOP / (2 * rows * inputs * outputs)))
        plain = best_seconds(lambda x=x, weight=weight: F.linear(x, weight), calls)
        ours = best_seconds(lambda x=x, weight=weight: matmul_transposed(x, weight), calls)
        flop = 2 * rows * inputs * outputs / 1e9
        print(f"{f'{rows} x {inputs} x {outputs}':>20} {flop / plain:>10.0f} {flop / ours:>10.0f}")
    module = torch.nn.Module()
    query, key, value = (torch.randn(20, heads, 48, 64, requires_grad=True) for heads in (9, 3, 3))
    mask = torch.zeros(20, 1, 48, 48)

    def ours_step() -> None:
        short_attention(module, query, key, value, mask)[0].sum().backward()

    def plain_step() -> None:
        F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).sum().backward()

    plain, ours = best_seconds(plain_step, 5) * 1e3, best_seconds(ours_step, 5) * 1e3
    print(f"attention forward + backward, 20 clips x 48 tokens: PyTorch {plain:.1f} ms, ours {ours:.1f} ms")


if __name__ == "__main__":
    main()
