"""The optimizer of a stage whose states DeepSpeed shares out to the ranks; its checkpoints are those of one process."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ultravox.errors import CheckpointError
from ultravox.training.engines.zero import ZeroEngine
from ultravox.training.optim import Optimizer, ParameterGroup


@dataclass(frozen=True, slots=True)
class _Part:
    """What this rank updates of a parameter."""

    flat: nn.Parameter
    """One of DeepSpeed's float32 vectors, which hold many parameters' parts and are what the rule updates."""
    start: int
    """In the vector."""
    offset: int
    """In the parameter, row by row."""
    numel: int

    def of(self, vector: Tensor) -> Tensor:
        """This part of a vector that lies like `flat`, in the same memory."""
        return vector.narrow(0, self.start, self.numel)


class ZeroOptimizer(Optimizer):
    """AdamW by DeepSpeed's ZeRO. Collective: all ranks must call each method alike.

    A parameter that has no gradient in a step counts as one with a gradient of zeros: DeepSpeed's vectors are updated
    as wholes, where `Optimizer` leaves such a parameter alone.
    """

    def __init__(
        self,
        groups: Iterable[ParameterGroup],
        *,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        fused: bool,
        engine: ZeroEngine,
    ) -> None:
        """Args:
        groups, weight_decay, betas, eps, fused: see `Optimizer`.
        engine: whose ranks hold the states until `finish`.
        """
        self._engine = engine
        super().__init__(
            groups, weight_decay=weight_decay, betas=betas, eps=eps, fused=fused, sum_over_ranks=engine.sum
        )
        self._shapes = {name: parameter.shape for name, parameter in self._named.items()}
        self._is_rounded = any(parameter.dtype != torch.float32 for parameter in self._named.values())
        self._parts: dict[str, _Part] = {}
        self._zero = engine.start(self._rule.optimizer).optimizer
        flats = self._flats()
        for name, parameter in self._named.items():
            if (part := _part(self._zero, parameter, flats, engine)) is not None and part.numel > 0:
                self._parts[name] = part

    def _master_of(self, parameter: nn.Parameter) -> nn.Parameter:
        return parameter  # DeepSpeed makes its own

    def _flats(self) -> list[nn.Parameter]:
        zero = self._zero
        return list(
            zero.fp32_partitioned_groups_flat if self._engine.is_sharded else zero.single_partition_of_fp32_groups
        )

    @property
    def num_held(self) -> int:
        """How many numbers' float32 copies and moments this rank holds, padding aside."""
        return sum(part.numel for part in self._parts.values())

    def zero_grad(self) -> None:
        """Forget this rank's gradients."""
        for parameter in self._named.values():
            parameter.grad = None

    def step(self, *, divisor: float, max_grad_norm: float, lr_factor: float, measure: bool = False) -> float:
        """See `Optimizer`."""
        self.measured = {}
        self._rule.set_rates(lr_factor)
        if not measure:
            return self._engine.update(divisor, max_grad_norm)
        self._engine.flush()
        found = {f"grad_norm_{part}": norm / divisor for part, norm in self._gradient_norms().items()}
        before = {name: part.of(part.flat.detach()).clone() for name, part in self._parts.items()}
        norm = self._engine.update(divisor, max_grad_norm)
        if math.isfinite(norm):
            now = {name: part.of(part.flat.detach()) - before[name] for name, part in self._parts.items()}
            weights, updates = self._norms(before), self._norms(now)
            found |= {f"update_ratio_{p}": updates[p] / weights[p] if weights[p] else math.inf for p in weights}
            self.measured = found
        return norm

    def _gradient_norms(self) -> dict[str, float]:
        """Of each part, of the sums over all ranks, which DeepSpeed holds as means."""
        from deepspeed.utils import safe_get_full_grad

        squares = {group.part: 0.0 for group in self.groups}
        for group in self.groups:
            for parameter in group.parameters.values():
                gradient = safe_get_full_grad(parameter)
                squares[group.part] += 0.0 if gradient is None else gradient.double().square().sum().item()
        return {part: math.sqrt(square) * self._engine.world_size for part, square in squares.items()}

    def _norms(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        """Of each part: of these parts of its parameters on all ranks."""
        squares = [
            sum(tensors[name].double().square().sum().item() for name in group.parameters if name in tensors)
            for group in self.groups
        ]
        found = self._engine.gather(squares)
        return {
            group.part: math.sqrt(sum(of_rank[index] for of_rank in found)) for index, group in enumerate(self.groups)
        }

    def finish(self) -> None:
        """See `Optimizer`; the parameters are whole again, and the states are gone."""
        self._engine.stop()

    def state_dict(self) -> dict[str, Tensor]:
        """See `Optimizer`: whole tensors, on each rank."""
        states = self._rule.optimizer.state
        found: dict[str, Tensor] = {}
        steps = [states[flat]["step"].item() for flat in self._flats() if flat in states]
        for name in self._named:
            if steps:  # all of a stage's vectors are updated in the same steps, on all ranks
                found[f"{name}.step"] = torch.tensor(steps[0])
                found |= {f"{name}.{key}": self._whole(name, key) for key in self._rule.shaped}
            if self._is_rounded:
                found[f"{name}.master"] = self._whole(name, None)
        return found

    def _whole(self, name: str, key: str | None) -> Tensor:
        """A state of a parameter from all ranks' parts, or its float32 copy."""
        shape = self._shapes[name]
        whole = torch.zeros(shape.numel(), device=self._engine.device)
        if (part := self._parts.get(name)) is not None:
            vector = part.flat.detach() if key is None else self._rule.optimizer.state[part.flat][key]
            whole[part.offset : part.offset + part.numel] = part.of(vector)
        dist.all_reduce(whole)
        return whole.reshape(shape)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `Optimizer`."""
        self._require_known(state)
        states = self._rule.optimizer.state
        steps = [float(value) for key, value in state.items() if key.endswith(".step")]
        for flat in self._flats() if steps else ():
            states[flat] = {"step": torch.tensor(max(steps), dtype=torch.float32)}
            states[flat] |= {key: torch.zeros_like(flat, requires_grad=False) for key in self._rule.shaped}
        for name, part in self._parts.items():
            for key in (*self._rule.shaped, "master"):
                if (value := state.get(f"{name}.{key}")) is None:
                    continue
                if value.shape != self._shapes[name]:
                    raise CheckpointError(f"the optimizer state of {name!r} has shape {list(value.shape)}")
                vector = part.flat.detach() if key == "master" else states[part.flat][key]
                part.of(vector).copy_(value.reshape(-1)[part.offset : part.offset + part.numel])


def _part(zero: Any, parameter: Any, flats: list[nn.Parameter], engine: ZeroEngine) -> _Part | None:
    """Where DeepSpeed has put this rank's part of a parameter, if it has one.

    Args:
        zero: DeepSpeed's optimizer (runtime/zero/stage3.py, stage_1_and_2.py).
        parameter: that trains.
        flats: the vectors of this rank.
        engine: of this rank.
    """
    if engine.is_sharded:
        group, start, padded = zero.grad_position[zero.get_param_id(parameter)]
        offset = engine.rank * padded
        return _Part(flats[group], start, offset, min(padded, parameter.ds_numel - offset))
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
    return _Part(flats[mapping.param_group_index], here.start, there.start, here.numel)
