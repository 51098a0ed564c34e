"""When checkpoints are written, where to, and which of them are kept."""

from typing import Literal

from pydantic import Field

from ultravox.config.section import Section

#: Metrics of an evaluation, and whether less of them is better.
LESS_IS_BETTER = {"wer": True, "cer": True, "kept_out_loss": True, "bleu": False, "chrf": False}


class CheckpointsConfig(Section):
    """What becomes of checkpoints; `stages[].checkpoint_every` says when they are written."""

    background: bool = Field(
        True, description="write while training goes on, from a copy in memory; false = training waits"
    )
    keep_last: int = Field(2, ge=1, le=10_000, description="so many of the newest are kept")
    keep_every: int = Field(0, ge=0, description="also those of every so many steps; 0 = none")
    keep_best: Literal["wer", "cer", "kept_out_loss", "bleu", "chrf"] | None = Field(
        None, description="also the one of each stage that is best by this metric of its evaluations; null = none"
    )
    upload: str | None = Field(
        None,
        min_length=1,
        description="also copy each to this folder of a store that fsspec knows, such as s3://bucket/run; null = no",
    )
