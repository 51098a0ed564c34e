"""AdamW with a learning rate per part of the model, schedules, and an optimizer state that is plain named tensors."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ultravox.errors import CheckpointError
from ultravox.training.engines.shards import is_shard, local_part, part_of_whole, shard_of_part

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Parameters of one part that share a peak learning rate."""

    part: str
    parameters: dict[str, nn.Parameter]
    lr: float


def lr_factor(
    step: int,
    *,
    warmup_steps: int,
    max_steps: int,
    schedule: Literal["cosine", "linear", "constant"],
    final_share: float,
) -> float:
    """What the peak rate is multiplied by at a step, which counts from 0.

    Linear rise to 1 at step `warmup_steps`, then down to `final_share` at `max_steps` (never, for "constant").
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    fall = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
    return final_share + (1 - final_share) * fall


class Optimizer:
    """AdamW over parameter groups. Gradients arrive as sums; `step` divides, clips and updates in few passes.

    Weight decay falls on matrices only, not on norms, biases and single rows. Parameters in bfloat16 are updated
    through a float32 copy: an update of a thousandth of a weight would be rounded away.
    """

    def __init__(
        self,
        groups: Iterable[ParameterGroup],
        *,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        sum_over_ranks: Callable[[float], float] = lambda value: value,
    ) -> None:
        """Args:
        groups: what trains.
        weight_decay, betas, eps: AdamW's.
        sum_over_ranks: adds up what each rank found of the parameters that it holds a part of.
        """
        self._sum = sum_over_ranks
        self.groups = [group for group in groups if group.parameters]
        self._named = {name: parameter for group in self.groups for name, parameter in group.parameters.items()}
        self._masters = {
            name: parameter
            if parameter.dtype == torch.float32 and not is_shard(parameter)
            else nn.Parameter(local_part(parameter.detach()).float())
            for name, parameter in self._named.items()
        }
        settings = []
        for group in self.groups:
            for decays in (True, False):
                parameters = [
                    self._masters[name]
                    for name, p in group.parameters.items()
                    if (p.dim() >= 2 and min(p.shape) > 1) == decays
                ]
                if parameters:
                    decay = weight_decay if decays else 0.0
                    rates = {"lr": group.lr, "peak": group.lr, "part": group.part}
                    settings.append({"params": parameters, "weight_decay": decay, **rates})
        self.measured: dict[str, float] = {}
        self._adamw = torch.optim.AdamW(settings, betas=betas, eps=eps, fused=True)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that trains."""
        return list(self._named.values())

    @property
    def rates(self) -> dict[str, float]:
        """Of each part: the learning rate of the last step."""
        return {group["part"]: group["lr"] for group in self._adamw.param_groups}

    def zero_grad(self) -> None:
        self._adamw.zero_grad(set_to_none=True)
        for parameter in self._named.values():  # those that AdamW does not hold, but a copy of
            parameter.grad = None

    def step(self, *, divisor: float, max_grad_norm: float, lr_factor: float, measure: bool = False) -> float:
        """Divide the gradients by `divisor`, scale them down to `max_grad_norm`, update.

        With `measure`, `measured` holds of each part the gradient's norm before clipping, `grad_norm_<part>`, and the
        norm of what was added to the weights by the weights' own, `update_ratio_<part>`.

        Returns: the norm before clipping. When it is not finite, nothing is updated.
        """
        self.measured = {}
        for name, parameter in self._named.items():
            if (master := self._masters[name]) is not parameter:
                master.grad = None if parameter.grad is None else local_part(parameter.grad).float()
        named = {name: p.grad for name, p in self._masters.items() if p.grad is not None}
        if not named:
            return 0.0
        gradients = list(named.values())
        norm = self._norm(named) / divisor
        if not math.isfinite(norm):
            return norm
        scale = min(1.0, max_grad_norm / (norm + 1e-6)) / divisor
        torch._foreach_mul_(gradients, scale)
        for group in self._adamw.param_groups:
            group["lr"] = group["peak"] * lr_factor
        before = {name: master.detach().clone() for name, master in self._masters.items()} if measure else {}
        if measure:  # the gradients are scaled by now
            self._measure("grad_norm", lambda name, master: master.grad, 1 / (scale * divisor))
        self._adamw.step()
        if measure:
            self._measure("update", lambda name, master: master.detach() - before[name], 1.0)
            self._measure("weight", lambda name, master: before[name], 1.0)
            for part in (group.part for group in self.groups):
                update, weight = (self.measured.pop(f"{what}_{part}") for what in ("update", "weight"))
                self.measured[f"update_ratio_{part}"] = update / weight if weight else math.inf
        for name, parameter in self._named.items():
            if (master := self._masters[name]) is not parameter:
                local_part(parameter.data).copy_(master.data)
        return norm

    def _norm(self, tensors: Mapping[str, Tensor]) -> float:
        """Of all these together, parameter → tensor, on all ranks."""
        found: tuple[list[Tensor], list[Tensor]] = ([], [])
        for name, tensor in tensors.items():
            found[is_shard(self._named[name])].append(tensor)
        whole, parts = (
            torch.linalg.vector_norm(torch.stack(torch._foreach_norm(many))).item() if many else 0.0 for many in found
        )
        if not any(is_shard(parameter) for parameter in self._named.values()):
            return whole
        return math.sqrt(whole**2 + self._sum(parts**2))

    def _measure(self, what: str, tensor_of: Callable[[str, nn.Parameter], Tensor | None], factor: float) -> None:
        """Note the norm of one tensor for each parameter, over each part."""
        for group in self.groups:
            found = ((name, tensor_of(name, self._masters[name])) for name in group.parameters)
            self.measured[f"{what}_{group.part}"] = self._norm({n: t for n, t in found if t is not None}) * factor

    def state_dict(self) -> dict[str, Tensor]:
        """`<parameter name>.{step, exp_avg, exp_avg_sq}`, and `.master` where the parameter is not float32.

        Sharded as the parameters are.
        """
        state = {
            f"{name}.{key}": shard_of_part(value, self._named[name])
            for name, master in self._masters.items()
            for key, value in self._adamw.state.get(master, {}).items()
        }
        rounded = (name for name, parameter in self._named.items() if parameter.dtype != torch.float32)
        return state | {f"{n}.master": shard_of_part(self._masters[n].detach(), self._named[n]) for n in rounded}

    def targets(self) -> dict[str, Tensor]:
        """Of each tensor that `state_dict` may hold, the parameter whose shape and sharding it has."""
        keys = (*_MOMENTS[1:], "master")
        return {f"{name}.{key}": parameter.detach() for name, parameter in self._named.items() for key in keys}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Undo `state_dict`, bit for bit, of whole tensors or of ones that are sharded alike.

        Raises:
            CheckpointError: the parameters are not the same ones.
        """
        found = {key.rpartition(".")[0] for key in state}
        if unknown := sorted(found - set(self._named)):
            raise CheckpointError(f"the optimizer state holds {unknown[0]!r}, which does not train here")
        for name, master in self._masters.items():
            parameter = self._named[name]
            entry = {key: state[f"{name}.{key}"] for key in _MOMENTS if f"{name}.{key}" in state}
            if (moment := entry.get("exp_avg")) is not None and moment.shape != parameter.shape:
                raise CheckpointError(f"the optimizer state of {name!r} has shape {list(moment.shape)}")
            entry = {key: part_of_whole(value, parameter).to(master.device, copy=True) for key, value in entry.items()}
            if entry:
                self._adamw.state[master] = entry
            if f"{name}.master" in state:
                master.data.copy_(part_of_whole(state[f"{name}.master"], parameter))
