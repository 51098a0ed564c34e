"""How much memory GPUs have, by their names; their rates are in `ultravox.training.peak_rate`."""

#: Bytes, from NVIDIA's data sheets. A name that stands for several sizes says which.
GPU_MEMORY: dict[str, float] = {
    "H200": 141e9,
    "H100": 80e9,
    "A100-80GB": 80e9,
    "A100-40GB": 40e9,
    "L40S": 48e9,
    "L4": 24e9,
    "A10": 24e9,
    "T4": 16e9,
}
