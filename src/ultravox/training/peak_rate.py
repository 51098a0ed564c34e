"""What a device can at best, which the utilisation in the log is a share of."""

import torch

#: Dense products of 16-bit numbers with sums in 32 bits, FLOP per second, by what the driver calls the GPU; from
#: NVIDIA's data sheets (their figures "with sparsity" are twice these). The first name that is part of it counts; of
#: those with None, sources differ.
GPU_RATES: dict[str, float | None] = {
    "H200 NVL": None,
    "H200": 989e12,
    "H100 NVL": None,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "T4": 65e12,
}


def gpu_rate(name: str) -> float | None:
    """FLOP per second of a GPU by its name; None where it is not known."""
    words = name.replace("-", " ").split()
    return next((rate for known, rate in GPU_RATES.items() if _contains(words, known.split())), None)


def peak_rate(device: torch.device, dtype: torch.dtype, given_tflops: float | None) -> float | None:
    """FLOP per second of one GPU; None where nothing is known of it, or where it has to be measured (a CPU).

    Args:
        device: where the model runs.
        dtype: of its weights; the table is of 16-bit numbers.
        given_tflops: what the user knows, in TFLOP/s.
    """
    if given_tflops is not None:
        return given_tflops * 1e12
    if device.type != "cuda" or dtype == torch.float32:
        return None
    return gpu_rate(torch.cuda.get_device_name(device))


def _contains(words: list[str], part: list[str]) -> bool:
    return any(words[start : start + len(part)] == part for start in range(len(words) - len(part) + 1))
