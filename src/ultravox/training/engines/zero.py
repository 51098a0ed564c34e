"""ZeRO by DeepSpeed's own engine: what the optimizer holds, and from stage 3 on the layers, is shared out to the ranks.

Stages 2 and 3 of Rajbhandari et al. 2019 (arXiv 1910.02054). DeepSpeed wants one forward function that all ranks run
alike, and adds up gradients in the order in which its hooks meet them, which differs where one rank has text alone. So
it never sees a forward pass of ours: gradients are left on the parameters (`coalesce_grad_reduction`), filled up with
zeros where a rank has none, and reduced once a step in the order of the parameters. In stage 3 the decoder's layers are
its leaf modules, each gathered as a whole before it runs; what else trains stays whole on each rank, its optimizer's
state does not.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ultravox.errors import ConfigError
from ultravox.training.engines.data_parallel import DataParallelEngine
from ultravox.training.engines.layers import decoder_layers
from ultravox.training.engines.ranks import Ranks

BUCKET_NUMBERS = 1 << 23
"""At most so many numbers, or one parameter, are reduced at once."""
KEPT = "kept whole"
"""Stands among the modules that use a parameter at the moment, so that it is not given back."""
DTYPES = (torch.float32, torch.bfloat16)


class ZeroEngine(DataParallelEngine):
    """Optimizer states in parts, and layers with stage 3. `start` hands a stage's parameters to DeepSpeed."""

    def __init__(
        self, ranks: Ranks, timeout_seconds: float, device: torch.device, *, stage: Literal["zero2", "zero3"]
    ) -> None:
        """Args:
        ranks, timeout_seconds, device: see `DataParallelEngine`.
        stage: of ZeRO.

        Raises:
            ConfigError: DeepSpeed is not installed.
        """
        super().__init__(ranks, timeout_seconds, device)
        self.kind = stage
        self.is_sharded = stage == "zero3"
        self._deepspeed = import_deepspeed(device)
        self._layers: list[nn.Module] = []
        self._before: list[tuple[Any, dict[str, Any], torch.dtype | None]] = []
        """Modules and parameters, with the attributes and dtype that they had before DeepSpeed took them over."""
        self._kept: list[nn.Parameter] = []
        self._scalars: list[nn.Parameter] = []
        """Without dimensions, which DeepSpeed cannot have: they have one while it runs."""
        self._sums: AbstractContextManager[None] | None = None
        self.running: Any = None
        """DeepSpeed's engine, between `start` and `stop`."""

    def prepare(self, model: nn.Module) -> None:
        """See `Engine`. ConfigError: a decoder without a list of layers, or numbers of another kind."""
        super().prepare(model)
        if odd := sorted({str(p.dtype) for p in model.parameters() if p.dtype not in DTYPES}):
            raise ConfigError(
                f"engine.kind {self.kind} trains float32 and bfloat16, but the model has numbers of "
                f"{odd[0].removeprefix('torch.')}: choose another model.dtype, or engine.kind ddp"
            )
        if self.is_sharded:
            self._layers = decoder_layers(model)

    def start(self, optimizer: torch.optim.Optimizer) -> Any:
        """Give the optimizer's parameters, and with stage 3 the layers, to DeepSpeed. Collective.

        Returns: its engine, whose `optimizer` holds this rank's parts.
        """
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        in_layers = {parameter for layer in self._layers for parameter in layer.parameters()}
        container = nn.Module()
        container.layers = nn.ModuleList(self._layers)
        container.others = nn.ParameterList(parameter for parameter in trained if parameter not in in_layers)
        owners = [*container.modules(), *container.parameters()]
        self._before = [(owner, dict(vars(owner)), getattr(owner, "dtype", None)) for owner in owners]
        self._scalars = [parameter for parameter in trained if parameter.dim() == 0]
        _reshape(self._scalars, (1,))
        for layer in self._layers:
            layer._z3_leaf = True  # type: ignore[assignment]
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "zero_optimization": {
                "stage": 3 if self.is_sharded else 2,
                "overlap_comm": False,
                "reduce_bucket_size": BUCKET_NUMBERS,
                "stage3_param_persistence_threshold": 0,
                "memory_efficient_linear": False,  # it would replace torch's own linear everywhere
            },
            "zero_allow_untested_optimizer": True,
            "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": "fp32"},
            "bf16": {"enabled": trained[0].dtype == torch.bfloat16},
        }
        self.running, *_ = self._deepspeed.initialize(
            model=container, optimizer=optimizer, config=config, dist_init_required=False
        )
        self._kept = list(container.others)
        self._keep(self._kept)
        self._collect()
        return self.running

    def backward(self, total: Tensor) -> None:
        """See `Engine`: with layers in parts also of a sum that is not finite, since the other ranks wait."""
        if not total.requires_grad:
            return
        total.backward()
        self.running.optimizer.backward_epilogue()  # layers of which no gradient was asked are given back too

    def reduce(self, parameters: Iterable[nn.Parameter]) -> None:
        """See `Engine`: nothing yet, since DeepSpeed would take what is reduced for part of the next step, were this
        one left out. `update` reduces."""

    def update(self, divisor: float, max_grad_norm: float) -> float:
        """Add the gradients of all ranks, divide them by `divisor`, clip, update. Collective.

        Returns: their norm before clipping. When it is not finite, nothing is updated.
        """
        running = self.running
        with self._company():
            self.flush()
            # DeepSpeed averages over the ranks, divides by the scale, and clips by the norm that this leaves
            running.optimizer.override_loss_scale(divisor / self.world_size)
            running.optimizer.clip_grad = max_grad_norm
            running.step()
            self._keep(self._kept)
        self._collect()
        return float(running.get_global_grad_norm())

    def flush(self) -> None:
        """Bring each gradient, as the mean over the ranks, to the rank that updates it. Collective."""
        if self._sums is not None:
            self._fill_up()
            self._sums.__exit__(None, None, None)
            self._sums = None

    def _collect(self) -> None:
        """From here on gradients stay on the parameters."""
        self._sums = self.running.coalesce_grad_reduction()
        self._sums.__enter__()

    def _fill_up(self) -> None:
        """Zeros for what this rank has no gradient of: all ranks must reduce the same, in the same order."""
        trained = [parameter for group in self._groups() for parameter in group]
        missing = [parameter.grad is None for parameter in trained]
        anywhere = [any(flags) for flags in zip(*self.gather(missing), strict=True)]
        for parameter, is_missing, needs in zip(trained, missing, anywhere, strict=True):
            if not needs:
                continue
            with self._gathered([parameter]):
                if is_missing:
                    parameter.grad = torch.zeros_like(parameter)

    def _groups(self) -> list[list[nn.Parameter]]:
        """What trains, in the order in which it is reduced."""
        optimizer = self.running.optimizer
        return list(optimizer.fp16_groups if self.is_sharded else optimizer.bit16_groups)

    def stop(self) -> None:
        """Take back what DeepSpeed holds: parameters are whole, with nothing on them that was not there. Collective."""
        running, self.running, self._sums = self.running, None, None
        taken = [owner for owner, _, _ in self._before if isinstance(owner, nn.Parameter)]
        if self.is_sharded:
            self._gather(taken)
        running.destroy()
        for owner, attributes, dtype in self._before:
            if isinstance(owner, nn.Parameter):
                owner.data = owner.data.to(dtype, copy=True)  # of its own memory, not a part of a buffer
                owner.grad = None
            else:
                owner._parameters = attributes["_parameters"]
            for name in set(vars(owner)) - set(attributes):
                delattr(owner, name)
        _reshape(self._scalars, ())
        self._before, self._kept, self._scalars = [], [], []

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """See `Engine`."""
        if not self.is_sharded or self.running is None:
            yield
            return
        parameters: list[Any] = [parameter for layer in self._layers for parameter in layer.parameters()]
        self._keep(parameters)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.ds_active_sub_modules.discard(KEPT)
            parameters[0].partition(param_list=parameters)

    def snapshot(self, read: Callable[[], dict[str, Tensor]], parameters: Iterable[nn.Parameter]) -> dict[str, Tensor]:
        """See `Engine`; copies."""
        with self._gathered(parameters):
            _reshape(self._scalars, ())
            found = {name: tensor.clone() for name, tensor in read().items()}
            _reshape(self._scalars, (1,) if self.running is not None else ())
        return found

    def _keep(self, parameters: Sequence[Any]) -> None:
        """Let each rank have these whole until DeepSpeed updates them."""
        if not self.is_sharded or not parameters:
            return
        self._gather(parameters)
        for parameter in parameters:
            parameter.ds_active_sub_modules.add(KEPT)

    def _gathered(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
        """Around what wants these whole."""
        in_parts = [p for p in parameters if KEPT not in getattr(p, "ds_active_sub_modules", (KEPT,))]
        found: AbstractContextManager[Any] = self._deepspeed.zero.GatheredParameters(in_parts, enabled=bool(in_parts))
        return found

    def _gather(self, parameters: Sequence[Any]) -> None:
        if parameters:
            with self._company():
                parameters[0].all_gather(param_list=list(parameters))


def _reshape(parameters: Iterable[nn.Parameter], shape: tuple[int, ...]) -> None:
    for parameter in parameters:
        parameter.data = parameter.data.reshape(shape)


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, for this device, saying nothing but warnings.

    Raises:
        ConfigError: it is not installed.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            "engine.kind zero2 and zero3 need DeepSpeed: pip install 'ultravox[deepspeed]', or choose fsdp2"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Sums go over gloo, as those of the other engines: its own kernels for a CPU would have to be compiled first
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False)
    return deepspeed
