"""How the processes of one run share its work."""

from typing import Literal

from pydantic import Field

from ultravox.config.section import Section, misfit


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
    max_memory_gb: float | None = Field(
        None,
        gt=0,
        description="a process that has more memory of its own (10^9 bytes), or of its GPU's, in a step ends the run "
        "after it, with a checkpoint and exit code 75; null = no bound",
    )
    reshard_after_forward: bool = Field(
        True,
        description="fsdp2: give a layer's weights back between its passes; false sends less and takes more memory",
    )

    def require_even_passes(self, name: str, key: str, distillation_weight: float, max_memory: float | None) -> None:
        """Refuse what would let ranks run sharded layers unequally often, so that all would hang.

        Args:
            name: of the stage.
            key: of the stage.
            distillation_weight, max_memory: of the stage.
        """
        if self.kind != "fsdp2":
            return
        if distillation_weight:
            raise misfit(
                f"stage {name!r} distils, but with engine.kind fsdp2 each rank must run the layers as often as the "
                "others, and the teacher runs only for texts that its cache does not hold: take ddp",
                "engine.kind",
                f"{key}.tune.distillation.weight",
            )
        if max_memory is not None:
            raise misfit(
                f"stage {name!r} measures memory on each rank by itself, but with engine.kind fsdp2 all must run the "
                "same passes: leave out max_batch_memory_gb, and lower max_batch_tokens",
                "engine.kind",
                f"{key}.max_batch_memory_gb",
            )
