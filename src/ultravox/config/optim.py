"""How weights are updated, and how fast."""

from typing import Literal

from pydantic import Field, model_validator

from ultravox.config.section import Beta, Rate, Section, Share, misfit


class LearningRates(Section):
    """Peak learning rate of each part."""

    projector: Rate = Field(1e-3, description="peak rate of the projector")
    language_model: Rate = Field(5e-4, description="peak rate of the language model's adapters")
    audio_encoder: Rate = Field(2e-5, description="peak rate of what trains in the audio encoder; LoRA bears 1e-4")


class OptimConfig(Section):
    """The optimizer and its schedule."""

    optimizer: Literal["adamw", "adamw_8bit", "adamw_schedule_free"] = Field(
        "adamw",
        description="adamw; adamw_8bit = its moments in 8 bits (torchao); adamw_schedule_free = on an average of its "
        "own way instead of a falling rate (schedulefree)",
    )
    fused: bool = Field(True, description="adamw: all of an update in one pass over memory; false = in several")
    lr: LearningRates = Field(default_factory=LearningRates, description="peak learning rates")
    weight_decay: float = Field(0.01, ge=0, le=1, description="decoupled weight decay, on matrices only")
    betas: tuple[Beta, Beta] = Field((0.9, 0.99), description="AdamW's decay rates of the two moments")
    eps: float = Field(1e-8, gt=0, le=1, description="AdamW's epsilon")
    warmup_steps: int = Field(0, ge=0, description="steps of linear rise to the peak rate")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="how the rate falls after that")
    final_lr_share: Share = Field(0.0, description="share of the peak rate left at the last step")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")

    @model_validator(mode="after")
    def _check(self) -> "OptimConfig":
        if not self.fused and self.optimizer != "adamw":
            raise misfit(f"fused: false has no effect with optimizer {self.optimizer}; drop it", "fused", "optimizer")
        if self.optimizer == "adamw_schedule_free" and self.schedule != "constant":
            raise misfit(
                f"optimizer adamw_schedule_free averages instead of letting the rate fall; set schedule: constant, got "
                f"{self.schedule}",
                "schedule",
                "optimizer",
            )
        return self
