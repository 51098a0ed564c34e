"""How a model runs while it trains: what buys speed or memory."""

from typing import Literal

from pydantic import Field

from ultravox.config.section import Section


class PerformanceConfig(Section):
    """What changes speed and memory, and numbers by no more than rounding (docs/performance.md)."""

    checkpoint_language_model: bool = Field(
        False,
        description="activation checkpointing: keep only what goes into each layer of the language model, and run it "
        "again on the way back; less memory for one more forward pass",
    )
    checkpoint_audio_encoder: bool = Field(False, description="the same for an audio encoder that trains")
    attention: Literal["auto", "eager", "sdpa", "flex_attention", "flash_attention_2"] = Field(
        "auto",
        description="the language model's attention; auto = our kernel where it applies (Llama models in float32 on a "
        "CPU), else transformers' choice",
    )
    compile: bool = Field(
        False,
        description="torch.compile of each layer of the language model, and of an encoder that trains, for any length; "
        "in place of our kernels for CPUs",
    )
    liger: bool = Field(False, description="Liger's Triton kernels in the language model; needs a GPU and its extra")
    tf32: bool = Field(False, description="let float32 products on GPUs round their factors to TensorFloat-32")
    empty_cache_every: int = Field(
        0, ge=0, description="steps between two returns of freed memory to the system or the GPU; 0 = never"
    )
    peak_tflops: float | None = Field(
        None,
        gt=0,
        description="what this device can at best, in TFLOP/s, for the utilisation in the log; null = measured on a "
        "CPU, from the data sheet of known GPUs",
    )
