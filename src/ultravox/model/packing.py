"""Several sequences in one row, none of which sees another: how any causal language model is called with them.

Where our own kernels apply (a Llama model in float32 on a CPU), `fast_attention.Packing` does it. Everywhere else it is
transformers that lets positions and attention start anew: from position ids that do, it makes block-diagonal masks for
SDPA, eager and flex attention, sliding windows included, and sequence lengths for flash attention. Some models (OPT,
Falcon, GPT-OSS) leave the positions out when they ask for their masks, so for them the masks are made here, by the same
functions. Models with recurrent layers cannot be packed at all. Which is which, no list could say for models to come:
each model is tried on two short sequences before it trains (`find_packer`).
"""

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_masks_for_generate, sdpa_mask
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from ultravox.errors import ModelError
from ultravox.model.fast_attention import Packing, takes_packed_rows
from ultravox.tokens import IGNORE_INDEX

#: Under a dense mask, attention costs the square of a row, so a batch becomes several rows, between so and so wide.
DENSE_WIDTHS = (128, 512)

#: Of the positions of a batch, filling included: matrix products like it, and oneDNN compiles for fewer numbers.
_POSITIONS_MULTIPLE = 8

BLOCK_MASK_ATTENTION = "ultravox_block_mask"

#: What configurations call dropout inside attention, which flex attention has none of.
_ATTENTION_DROPOUTS = ("attention_dropout", "attn_pdrop", "attn_dropout", "attention_probs_dropout_prob")

#: Flex attention compiles for no narrower heads than these.
_MIN_FLEX_HEAD = 16

_PROBE_LENGTHS = (7, 5)


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Where the tokens of a batch stand when sequences share rows, and what the language model must be told."""

    slots: Int[Tensor, " token"]
    """Place of each token, one sequence after the other, in rows that follow one another."""
    shape: tuple[int, int]
    """Rows and their width."""
    arguments: dict[str, Any]
    """For the language model, beside its input."""

    def place(self, tokens: Tensor, filling: int = 0) -> Tensor:
        """What belongs to the tokens, [token, ...] → [row, position, ...], `filling` where no token stands."""
        places = tokens.new_full((self.shape[0] * self.shape[1], *tokens.shape[1:]), filling)
        return places.index_copy(0, self.slots, tokens).view(*self.shape, *tokens.shape[1:])

    def place_labels(
        self, labels: Int[Tensor, "sequence token"], mask: Bool[Tensor, "sequence token"]
    ) -> Int[Tensor, "row position"]:
        """Labels of right-padded sequences. A sequence's first token is nobody's next: it stands behind another one."""
        labels = labels.clone()
        labels[:, 0] = IGNORE_INDEX
        return self.place(labels[mask], IGNORE_INDEX)


@dataclass(frozen=True, slots=True)
class Packer:
    """Packs batches for one language model.

    Args:
        decoder: the language model without its output layer.
        way: `kernels` = our own; `positions` = transformers makes the masks from position ids; `masks` = they are made
            here, as the model itself would make them if it passed its positions on.
    """

    decoder: Any
    way: Literal["kernels", "positions", "masks"]

    @property
    def plan_mode(self) -> Literal["packed", "best_fit"]:
        """How batches are best planned: our kernels pad inside attention, so they like sequences of like length."""
        return "packed" if self.way == "kernels" else "best_fit"

    def pack(self, mask: Bool[Tensor, "sequence token"]) -> PackedRows:
        """From the mask of right-padded sequences, True at their tokens."""
        if self.way == "kernels":
            packing = Packing.of(mask)
            arguments = packing.arguments(torch.empty(0, dtype=self.decoder.dtype, device=mask.device))
            slots = torch.arange(packing.num_rows, device=mask.device)
            return PackedRows(slots, (1, len(packing.to_packed)), arguments)
        lengths = mask.sum(1).tolist()
        hidden_size = self.decoder.config.get_text_config().hidden_size
        slots, shape = _slots(lengths, None if self._is_sparse() else hidden_size)
        # what fills up has position 0 throughout: each place is a sequence of its own
        positions = torch.zeros(shape[0] * shape[1], dtype=torch.long)
        positions[slots] = torch.cat([torch.arange(length) for length in lengths])
        positions = positions.view(shape).to(mask.device)
        return PackedRows(slots.to(mask.device), shape, self._arguments(positions))

    def _is_sparse(self) -> bool:
        """Whether attention skips what the mask hides, so that one long row costs no more than several."""
        config = self.decoder.config
        is_flex = config._attn_implementation in ("flex_attention", BLOCK_MASK_ATTENTION)
        return is_flex or is_flash_attention_requested(config)

    def _arguments(self, positions: Int[Tensor, "row position"]) -> dict[str, Any]:
        config = self.decoder.config
        arguments: dict[str, Any] = {"position_ids": positions, "attention_mask": None}
        if is_flash_attention_requested(config):
            # found out once here, instead of in every layer with a wait for the device
            (queries, keys), (max_query, max_key) = prepare_fa_kwargs_from_position_ids(positions)
            lengths = {"cu_seq_lens_q": queries, "cu_seq_lens_k": keys}
            return arguments | lengths | {"max_length_q": int(max_query), "max_length_k": int(max_key)}
        if self.way == "masks":
            like = torch.empty(*positions.shape, 0, dtype=self.decoder.dtype, device=positions.device)
            arguments["attention_mask"] = create_masks_for_generate(config, like, None, None, positions)
        return arguments


def _slots(lengths: list[int], hidden_size: int | None) -> tuple[Tensor, tuple[int, int]]:
    """Share sequences out among rows. Returns the place of each token [token], number of rows and their width.

    Args:
        lengths: tokens of each sequence.
        hidden_size: the language model's; attention under a dense mask was measured to cost as much as all else where
            a row is twice as wide as that (SmolLM2-135M on a CPU). None = attention skips what is masked: one row.
    """
    if hidden_size is None:
        return _share_out(lengths, 1)
    least, most = DENSE_WIDTHS
    fewest = max(1, sum(lengths) // max(*lengths, most))
    choices = (
        _share_out(lengths, rows) for rows in range(fewest, max(fewest, sum(lengths) // max(*lengths, least)) + 1)
    )
    return min(choices, key=lambda choice: choice[1][0] * choice[1][1] * (2 * hidden_size + choice[1][1]))


def _share_out(lengths: list[int], num_rows: int) -> tuple[Tensor, tuple[int, int]]:
    """As `_slots`: the longest first, each into the emptiest row, so that the rows end up evenly full.

    Graham 1969, Bounds on multiprocessing timing anomalies.
    """
    rows = [(0, row) for row in range(num_rows)]
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index]) if num_rows > 1 else range(len(lengths))
    places = [(0, 0)] * len(lengths)
    for index in order:
        used, row = rows[0]
        places[index] = (row, used)
        heapq.heapreplace(rows, (used + lengths[index], row))
    multiple = _POSITIONS_MULTIPLE // math.gcd(_POSITIONS_MULTIPLE, num_rows)
    width = -(-max(rows)[0] // multiple) * multiple
    firsts = torch.tensor([row * width + used for row, used in places])
    counts = torch.tensor(lengths)
    offsets = (firsts - counts.cumsum(0) + counts).repeat_interleave(counts)
    return offsets + torch.arange(len(offsets)), (num_rows, width)


def find_packer(language_model: PreTrainedModel, wish: Literal["auto", "on", "off"]) -> Packer | None:
    """How to pack for a language model; None = not at all.

    Args:
        wish: `auto` = where our own kernels apply; `on` = always; `off` = never.

    Raises:
        ModelError: `on`, and in this model one packed sequence would see another.
    """
    decoder: Any = language_model.get_decoder()
    if wish != "off" and takes_packed_rows(decoder):
        return Packer(decoder, "kernels")
    if wish != "on":
        return None
    use_block_masks(language_model)
    packers = Packer(decoder, "positions"), Packer(decoder, "masks")
    reasons = []
    for packer in packers:
        reason = _why_not(packer, language_model.get_input_embeddings().weight)
        if reason is None:
            return packer
        reasons.append(reason)
    raise ModelError(
        f"packing: on, but {type(language_model).__name__} cannot keep packed clips apart ({reasons[0]}; with masks of "
        f"ours: {reasons[1]}): set packing to auto or off"
    )


def _why_not(packer: Packer, table: Float[Tensor, "vocabulary hidden"]) -> str | None:
    """Try two short sequences in one row: why the second is not what it is alone, or None.

    What one has to do with the other is read from the gradient, which is exactly 0 where nothing passes, in any number
    type; differences of values would drown in rounding.
    """
    decoder = packer.decoder
    modes = {module: module.training for module in decoder.modules()}
    decoder.eval()
    mask = torch.arange(max(_PROBE_LENGTHS)) < torch.tensor(_PROBE_LENGTHS)[:, None]
    tokens = table.detach()[torch.arange(sum(_PROBE_LENGTHS), device=table.device) % len(table)]
    tokens.requires_grad_(True)
    try:
        with torch.enable_grad():
            packed = packer.pack(mask.to(table.device))
            output = decoder(inputs_embeds=packed.place(tokens), use_cache=False, **packed.arguments).last_hidden_state
            second = output.flatten(0, 1)[packed.slots[_PROBE_LENGTHS[0] :]]
            alone = decoder(inputs_embeds=tokens[None, _PROBE_LENGTHS[0] :], use_cache=False).last_hidden_state[0]
            weights = torch.sin(torch.arange(second.numel(), device=table.device)).view_as(second)
            (gradient,) = torch.autograd.grad((second * weights).sum(), tokens)
    except Exception as error:  # whatever a model that was not made for this answers with
        return next(iter(str(error).splitlines()), type(error).__name__)
    finally:
        for module, training in modes.items():
            module.training = training
    if gradient[: _PROBE_LENGTHS[0]].any():
        return "one sees another: recurrent layers, or attention that takes no positions"
    difference = float(((second - alone).norm() / alone.norm()).detach())
    limit = 1e-3 if table.dtype == torch.float32 else 0.1
    return None if difference < limit else "positions do not start anew"


def use_block_masks(language_model: PreTrainedModel, devices: tuple[str, ...] = ("cuda",)) -> None:
    """On a GPU, let a language model with SDPA attend packed rows by flex attention, which skips what is masked.

    All else, evaluation and generation included, stays with SDPA. Models with dropout in attention, or that do not
    support flex attention, stay as they are; so do those for which someone chose flash attention.
    """
    config = language_model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    fits = language_model._supports_flex_attn and width >= _MIN_FLEX_HEAD
    has_dropout = any(getattr(config, name, 0) for name in _ATTENTION_DROPOUTS)
    if language_model.device.type in devices and config._attn_implementation == "sdpa" and fits and not has_dropout:
        ALL_ATTENTION_FUNCTIONS.register(BLOCK_MASK_ATTENTION, _block_mask_attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(BLOCK_MASK_ATTENTION, _block_mask)
        language_model.set_attn_implementation(BLOCK_MASK_ATTENTION)


def _block_mask(*, allow_is_causal_skip: bool = True, use_vmap: bool = False, **arguments: Any) -> Any:
    """A mask in the form that transformers registers: of blocks for packed rows, which only training has."""
    is_packed = not allow_is_causal_skip and not use_vmap and arguments["q_length"] == arguments["kv_length"] > 1
    if is_packed and arguments.get("attention_mask") is None:
        return ALL_MASK_ATTENTION_FUNCTIONS["flex_attention"](**arguments)
    return sdpa_mask(allow_is_causal_skip=allow_is_causal_skip, use_vmap=use_vmap, **arguments)


def _block_mask_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **others: Any) -> Any:
    """An attention function in the form that transformers registers."""
    name = "sdpa" if mask is None or isinstance(mask, Tensor) else "flex_attention"
    attention: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[name]
    return attention(module, query, key, value, mask, **others)
