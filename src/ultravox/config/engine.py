"""How the processes of one run share its work."""

from typing import Literal

from pydantic import Field

from ultravox.config.section import Section, misfit


class EngineConfig(Section):
    """How the processes of one run share its work; the launcher (torchrun) says how many there are."""

    kind: Literal["auto", "single", "ddp", "fsdp2", "zero2", "zero3"] = Field(
        "auto",
        description="single = one process; ddp = each process holds the whole model, gradients are added; fsdp2 = each "
        "holds a part of every layer of the language model; zero2 = each holds a part of the optimizer's state "
        "(DeepSpeed); zero3 = and of every layer; auto = single or ddp, by the number of processes",
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
        if self.kind not in ("fsdp2", "zero3"):
            return
        if distillation_weight:
            raise misfit(
                f"stage {name!r} distils, but with engine.kind {self.kind} each rank must run the layers as often as "
                "the others, and the teacher runs only for texts that its cache does not hold: take ddp",
                "engine.kind",
                f"{key}.tune.distillation.weight",
            )
        if max_memory is not None:
            raise misfit(
                f"stage {name!r} measures memory on each rank by itself, but with engine.kind {self.kind} all must run "
                "the same passes: leave out max_batch_memory_gb, and lower max_batch_tokens",
                "engine.kind",
                f"{key}.max_batch_memory_gb",
            )

    def require_shared_states(self, name: str, key: str, optimizer: str) -> None:
        """Refuse an optimizer whose state the engine cannot cut.

        Args:
            name: of the stage.
            key: of the stage.
            optimizer: of the stage.
        """
        if self.kind == "fsdp2" and optimizer == "adamw_8bit":
            raise misfit(
                f"stage {name!r}: adamw_8bit has a scale for each 256 numbers, which engine.kind fsdp2 would cut "
                "through: take adamw, whose moments are shared between the ranks, or ddp",
                f"{key}.optim.optimizer",
                "engine.kind",
            )
        if self.kind in ("zero2", "zero3") and optimizer != "adamw":
            raise misfit(
                f"stage {name!r}: with engine.kind {self.kind} DeepSpeed updates vectors of many parameters, for which "
                f"{optimizer} is not made: take adamw, whose moments are shared between the ranks, or ddp",
                f"{key}.optim.optimizer",
                "engine.kind",
            )

    def require_form(self, dtype: str, *, compiles: bool) -> None:
        """Refuse a model in a form that the engine does not train.

        Args:
            dtype: of the model.
            compiles: whether each of its layers is compiled.
        """
        if self.kind in ("zero2", "zero3") and dtype == "float16":
            raise misfit(
                f"engine.kind {self.kind} trains float32 and bfloat16, since the scale of losses in float16 is kept by "
                "the other engines: choose model.dtype bfloat16, or engine.kind ddp or fsdp2",
                "model.dtype",
                "engine.kind",
            )
        if self.kind == "zero3" and compiles:
            raise misfit(
                "performance.compile fixes where a layer's weights lie, which come and go with engine.kind zero3: "
                "leave it out, or choose zero2 or fsdp2",
                "performance.compile",
                "engine.kind",
            )
