"""One update of all that trains, a learning rate for each part of the model, schedules; the state is plain tensors."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ultravox.errors import CheckpointError
from ultravox.training.engines.shards import is_shard, local_part, part_of_whole, shard_of_part
from ultravox.training.update_rules import RULES, UpdateRule


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
    """An update rule over parameter groups. Gradients arrive as sums; `step` divides, clips and updates in few passes.

    Weight decay falls on matrices only, not on norms, biases and single rows. Parameters in 16 bits are updated
    through a float32 copy: an update of a thousandth of a weight would be rounded away.
    """

    def __init__(
        self,
        groups: Iterable[ParameterGroup],
        *,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        rule: str = "adamw",
        fused: bool = True,
        sum_over_ranks: Callable[[float], float] = lambda value: value,
    ) -> None:
        """Args:
        groups: what trains.
        weight_decay, betas, eps, fused: AdamW's.
        rule: one of `RULES`.
        sum_over_ranks: adds up what each rank found of the parameters that it holds a part of.
        """
        self._sum = sum_over_ranks
        self.groups = [group for group in groups if group.parameters]
        self._named = {name: parameter for group in self.groups for name, parameter in group.parameters.items()}
        self._masters = {name: self._master_of(parameter) for name, parameter in self._named.items()}
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
        self._trained: dict[str, Tensor] = {}
        """What trains, while the model holds its average."""
        self._rule: UpdateRule = RULES[rule](settings, betas, eps, fused=fused)

    def _master_of(self, parameter: nn.Parameter) -> nn.Parameter:
        """What the rule updates for a parameter."""
        if parameter.dtype == torch.float32 and not is_shard(parameter):
            return parameter
        return nn.Parameter(local_part(parameter.detach()).float())

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that trains."""
        return list(self._named.values())

    @property
    def rates(self) -> dict[str, float]:
        """Of each part: the learning rate of the last step."""
        return {group["part"]: float(group["lr"]) for group in self._rule.optimizer.param_groups}

    def zero_grad(self) -> None:
        self._rule.optimizer.zero_grad(set_to_none=True)
        for parameter in self._named.values():  # those that the rule does not hold, but a copy of
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
        self._rule.set_rates(lr_factor)
        before = {name: master.detach().clone() for name, master in self._masters.items()} if measure else {}
        if measure:  # the gradients are scaled by now
            self._measure("grad_norm", lambda name, master: master.grad, 1 / (scale * divisor))
        self._rule.step()
        if measure:
            self._measure("update", lambda name, master: master.detach() - before[name], 1.0)
            self._measure("weight", lambda name, master: before[name], 1.0)
            for part in (group.part for group in self.groups):
                update, weight = (self.measured.pop(f"{what}_{part}") for what in ("update", "weight"))
                self.measured[f"update_ratio_{part}"] = update / weight if weight else math.inf
        self._copy_masters()
        return norm

    def _copy_masters(self) -> None:
        """Bring the parameters that have a float32 copy up to date."""
        for name, parameter in self._named.items():
            if (master := self._masters[name]) is not parameter:
                local_part(parameter.data).copy_(master.data)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the block the model holds the weights that are to be used, where those are not the ones that train."""
        if not self.averages:
            yield
            return
        self._trained = {name: master.detach().clone() for name, master in self._masters.items()}
        try:
            self.finish()
            yield
        finally:
            for name, weights in self._trained.items():
                self._masters[name].data.copy_(weights)
            self._trained = {}
            self._copy_masters()

    def finish(self) -> None:
        """After the last step: leave the weights in the model that are to be used."""
        if self._rule.average():
            self._copy_masters()

    @property
    def averages(self) -> bool:
        """Whether what is used is an average of what trains."""
        return type(self._rule).average is not UpdateRule.average

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

        Other rules have other moments. Sharded as the parameters are. Where the model is to be
        used with an average of what trains, `.master` holds what trains, of each parameter.
        """
        state = {
            f"{name}.{key}": shard_of_part(value, self._named[name]) if key in self._rule.shaped else value
            for name, master in self._masters.items()
            for key, value in self._rule.state(master).items()
        }
        rounded = (n for n, parameter in self._named.items() if self.averages or parameter.dtype != torch.float32)
        trained = {name: self._trained.get(name, self._masters[name].detach()) for name in rounded}
        return state | {f"{name}.master": shard_of_part(part, self._named[name]) for name, part in trained.items()}

    def targets(self) -> dict[str, Tensor]:
        """Of each tensor that `state_dict` may hold, the parameter whose shape and sharding it has."""
        keys = (*self._rule.shaped, "master")
        return {f"{name}.{key}": parameter.detach() for name, parameter in self._named.items() for key in keys}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Undo `state_dict`, bit for bit, of whole tensors or of ones that are sharded alike.

        Raises:
            CheckpointError: the parameters are not the same ones.
        """
        self._require_known(state)
        for name, master in self._masters.items():
            parameter = self._named[name]
            entry = {key: state[f"{name}.{key}"] for key in self._rule.moments if f"{name}.{key}" in state}
            for key in self._rule.shaped:
                if (moment := entry.get(key)) is not None and moment.shape != parameter.shape:
                    raise CheckpointError(f"the optimizer state of {name!r} has shape {list(moment.shape)}")
                if moment is not None:
                    entry[key] = part_of_whole(moment, parameter)
            if entry:
                self._rule.load(master, {key: value.to(master.device, copy=True) for key, value in entry.items()})
            if f"{name}.master" in state:
                master.data.copy_(part_of_whole(state[f"{name}.master"], parameter))
        if self.averages:
            self._copy_masters()

    def _require_known(self, state: Mapping[str, Tensor]) -> None:
        """CheckpointError: a state is of a parameter that does not train here."""
        endings = ("master", *sorted(self._rule.moments, key=len, reverse=True))
        found = {next((key.removesuffix(f".{e}") for e in endings if key.endswith(f".{e}")), key) for key in state}
        if unknown := sorted(found - set(self._named)):
            raise CheckpointError(f"the optimizer state holds {unknown[0]!r}, which does not train here")
