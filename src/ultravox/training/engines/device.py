"""Which processor a rank trains on."""

import torch

from ultravox.errors import ConfigError


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of a name: `auto` is CUDA, else Apple's MPS, else the CPU. Of several GPUs, this rank's own.

    Raises:
        ConfigError: there is none such, or fewer than processes on this machine.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(kind for kind, is_there in there.items() if is_there) if name == "auto" else name
    if not there[kind]:
        found = ", ".join(kind for kind, is_there in there.items() if is_there)
        raise ConfigError(f"device {kind} is not to be had here: choose auto or {found}, or install its build of torch")
    if kind != "cuda":
        return torch.device(kind)
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"LOCAL_RANK {local_rank} has no GPU of its own, of {torch.cuda.device_count()}: start one process for each"
        )
    return torch.device("cuda", local_rank)
