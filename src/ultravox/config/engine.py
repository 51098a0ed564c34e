"""How the processes of one run share its work."""

from typing import Literal

from pydantic import Field

from ultravox.config.section import Section


class EngineConfig(Section):
    """How the processes of one run share its work; the launcher (torchrun) says how many there are."""

    kind: Literal["auto", "single", "ddp", "fsdp2"] = Field(
        "auto",
        description="single = one process; ddp = each process holds the whole model, gradients are added; fsdp2 = each "
        "holds a part of every layer of the language model; auto = single or ddp, by the number of processes",
    )
    timeout_seconds: float = Field(
        600.0, gt=0, le=86_400, description="a step that takes longer, on any process, ends the run with all stacks"
    )
    reshard_after_forward: bool = Field(
        True,
        description="fsdp2: give a layer's weights back between its passes; false sends less and takes more memory",
    )
