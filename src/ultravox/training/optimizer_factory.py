"""From a stage's configuration to its optimizer, as the engine wants it."""

from collections.abc import Sequence

from ultravox.config.optim import OptimConfig
from ultravox.training.engines.base import Engine
from ultravox.training.optim import Optimizer, ParameterGroup


def build_optimizer(groups: Sequence[ParameterGroup], optim: OptimConfig, engine: Engine) -> Optimizer:
    """The optimizer of what trains in a stage. Collective where the engine shares out its states."""
    if engine.kind in ("zero2", "zero3"):
        from ultravox.training.engines.zero import ZeroEngine
        from ultravox.training.zero_optimizer import ZeroOptimizer

        assert isinstance(engine, ZeroEngine)
        return ZeroOptimizer(
            groups,
            weight_decay=optim.weight_decay,
            betas=optim.betas,
            eps=optim.eps,
            fused=optim.fused,
            engine=engine,
        )
    return Optimizer(
        groups,
        weight_decay=optim.weight_decay,
        betas=optim.betas,
        eps=optim.eps,
        rule=optim.optimizer,
        fused=optim.fused,
        sum_over_ranks=engine.sum,
    )
