"""Random states that are a function of the run's seed and of a purpose."""

import hashlib
import random

import numpy as np
import torch


def seed_everything(seed: int, purpose: str) -> None:
    """Seed torch, numpy and python for one purpose, whatever was drawn before it."""
    number = int.from_bytes(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:4], "little")
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)
