"""The optimizers that update weights from gradients, and their states as plain named tensors, a few for each parameter.

AdamW: Loshchilov and Hutter 2019, arXiv 1711.05101. With moments in 8 bits (torchao): Dettmers et al. 2022, arXiv
2110.02861. Schedule-free (schedulefree): Defazio et al. 2024, arXiv 2405.15682.
"""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ultravox.errors import CheckpointError, ConfigError
from ultravox.model.performance import require_compiler

Groups = Sequence[dict[str, Any]]
"""`params`, `lr` and `weight_decay` of each."""


class UpdateRule:
    """AdamW, in one fused pass. The others change what differs."""

    moments: tuple[str, ...] = ("step", "exp_avg", "exp_avg_sq")
    """Names of a parameter's state."""
    shaped: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
    """Those of the parameter's own shape."""

    def __init__(self, groups: Groups, betas: tuple[float, float], eps: float, *, fused: bool = True) -> None:
        self.optimizer = self._make(groups, betas, eps, fused=fused)

    def _make(self, groups: Groups, betas: tuple[float, float], eps: float, *, fused: bool) -> Any:
        return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=fused)

    def set_rates(self, factor: float) -> None:
        """Each group's `lr` = its `peak` × factor."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor

    def step(self) -> None:
        """Update all parameters that have a gradient."""
        self.optimizer.step()

    def state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Of one parameter, by the names of `moments`; empty before its first update."""
        return dict(self.optimizer.state.get(parameter, {}))

    def load(self, parameter: nn.Parameter, state: Mapping[str, Tensor]) -> None:
        """Undo `state`; these tensors are kept."""
        self.optimizer.state[parameter] = dict(state)

    def average(self) -> bool:
        """Put the weights that are to be used in the place of those that train; whether there is such a difference."""
        return False


class ScheduleFreeRule(UpdateRule):
    """The gradient is taken between the average of all weights so far, which is the result, and the newest ones."""

    moments = ("k", "weight_sum", "lr_max", "z", "exp_avg_sq")
    shaped = ("z", "exp_avg_sq")
    _of_group = ("k", "weight_sum", "lr_max")

    def _make(self, groups: Groups, betas: tuple[float, float], eps: float, *, fused: bool) -> Any:
        kind = _import("schedulefree", "adamw_schedule_free").AdamWScheduleFree
        optimizer = kind(list(groups), betas=betas, eps=eps)
        optimizer.train()
        return optimizer

    def state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """See `UpdateRule`; what belongs to a group is told of each of its parameters."""
        found = dict(self.optimizer.state.get(parameter, {}))
        group = self._group(parameter)
        numbers = {name: torch.tensor(group[name], dtype=torch.float64) for name in self._of_group}
        return numbers | found if found else {}

    def load(self, parameter: nn.Parameter, state: Mapping[str, Tensor]) -> None:
        """See `UpdateRule`."""
        group = self._group(parameter)
        for name in self._of_group:
            group[name] = state[name].item()
        group["k"] = int(group["k"])
        self.optimizer.state[parameter] = {name: state[name] for name in self.shaped}

    def average(self) -> bool:
        """See `UpdateRule`. The optimizer believes that they train: its caller puts those back, bit for bit."""
        self.optimizer.eval()
        for group in self.optimizer.param_groups:
            group["train_mode"] = True
        return True

    def _group(self, parameter: nn.Parameter) -> dict[str, Any]:
        return next(group for group in self.optimizer.param_groups if any(p is parameter for p in group["params"]))


class EightBitRule(UpdateRule):
    """AdamW whose moments take a byte a number, with a scale for each 256 of them; small tensors keep theirs whole."""

    moments = ("step", *(f"{m}{part}" for m in ("exp_avg", "exp_avg_sq") for part in ("", ".codes", ".scale")))

    def _make(self, groups: Groups, betas: tuple[float, float], eps: float, *, fused: bool) -> Any:
        require_compiler(groups[0]["params"][0].device, "optim.optimizer adamw_8bit")
        return _import("torchao.optim", "adamw_8bit").AdamW8bit(list(groups), betas=betas, eps=eps)

    def set_rates(self, factor: float) -> None:
        """See `UpdateRule`; its rates are tensors, or its compiled step would be another one for each."""
        for group in self.optimizer.param_groups:
            group["lr"].fill_(group["peak"] * factor)

    def state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """See `UpdateRule`: codes and scales of what is in 8 bits."""
        found: dict[str, Tensor] = {}
        for name, value in self.optimizer.state.get(parameter, {}).items():
            if hasattr(value, "codes"):
                found |= {f"{name}.codes": value.codes, f"{name}.scale": value.scale}
            else:
                found[name] = value
        return found

    def load(self, parameter: nn.Parameter, state: Mapping[str, Tensor]) -> None:
        """See `UpdateRule`. CheckpointError: the state is not in 8 bits, where this parameter's should be."""
        kept = {"step": state["step"]}
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            value = self.optimizer._new_buffer(parameter, signed)
            parts = (value.codes, value.scale) if hasattr(value, "codes") else (value,)
            keys = (f"{name}.codes", f"{name}.scale") if len(parts) == 2 else (name,)
            for key, part in zip(keys, parts, strict=True):
                if key not in state or state[key].shape != part.shape:
                    raise CheckpointError(f"the optimizer state has no {key} of shape {list(part.shape)}")
                part.copy_(state[key])
            kept[name] = value
        self.optimizer.state[parameter] = kept


RULES: dict[str, type[UpdateRule]] = {
    "adamw": UpdateRule,
    "adamw_8bit": EightBitRule,
    "adamw_schedule_free": ScheduleFreeRule,
}


def _import(module: str, optimizer: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ConfigError(
            f"optim.optimizer {optimizer} is {package}'s, which is not installed ({error}): pip install "
            f"'ultravox[{package}]', or choose adamw"
        ) from error
