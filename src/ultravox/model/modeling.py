"""A causal language model that hears: encoder → projector → the places of ``<|audio|>`` in the prompt."""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ultravox.audio.lengths import num_audio_tokens
from ultravox.errors import DataError
from ultravox.model.adapters import merged_state
from ultravox.model.audio_encoder import AudioEncoder
from ultravox.model.audio_tower import run_as, tower_from_config
from ultravox.model.boundaries import AudioBoundaries
from ultravox.model.configuration import UltravoxConfig
from ultravox.model.ctc_projector import CtcProjector
from ultravox.model.fusion import fuse, leave_out
from ultravox.model.layer_mix import LayerMix
from ultravox.model.manifest import verify_manifest, write_manifest
from ultravox.model.projector import Projector
from ultravox.model.projector_factory import projector_from_config
from ultravox.tokens import IGNORE_INDEX

_AUDIO_INPUTS = ("audio_values", "audio_lens", "audio_token_len")


class UltravoxModel(PreTrainedModel, GenerationMixin):
    """The public ``ultravox`` model.

    Args:
        config: everything that the checkpoint's config.json holds.
        audio_tower: an encoder with its weights; None = a random one as `config.audio_config` says.
        language_model: a causal LM with its weights; None = a random one as `config.text_config` says.
    """

    config_class = UltravoxConfig
    config: UltravoxConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: UltravoxConfig,
        audio_tower: AudioEncoder | None = None,
        language_model: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        for built in (audio_tower, language_model):
            for module in built.modules() if built is not None else ():
                module._is_hf_initialized = True  # or post_init would draw its weights anew
        self.audio_tower = tower_from_config(config) if audio_tower is None else audio_tower
        run_as(self.audio_tower, config)
        self.language_model = (
            AutoModelForCausalLM.from_config(config.text_config) if language_model is None else language_model
        )
        self.audio_boundaries: AudioBoundaries | None = None
        """Their rows while they train; None where there are none, or where they are rows like others."""
        mixed = self.audio_tower.num_mixed
        self.layer_mix = LayerMix(mixed) if self.audio_tower.mixes_layers else None
        self.multi_modal_projector = projector_from_config(config, self.audio_tower.hidden_size // mixed)
        self.generation_config = self.language_model.generation_config
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Projector | LayerMix):
            module.reset_parameters()

    def get_input_embeddings(self) -> nn.Module:
        """The language model's table."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's table."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language model's output layer."""
        return self.language_model.get_output_embeddings()

    def get_decoder(self) -> nn.Module:
        """The language model without its output layer."""
        return self.language_model.get_decoder()

    def embedding_rms(self) -> float:
        """Root mean square of what the language model makes of its tokens: the scale that audio should have."""
        return self.embedding_scale() * float(self._table().detach().float().square().mean().sqrt())

    @torch.no_grad()
    def embedding_scale(self) -> float:
        """What the language model multiplies a row of its table by before it reads it: √hidden in Gemma, else 1."""
        token = self._table()[:1024].float().norm(dim=1).argmax()
        row, read = self._table()[token].float(), self.get_input_embeddings()(token[None])[0].float()
        place = row.abs().argmax()
        return float(read[place] / row[place])

    def encode_audio(
        self, audio_values: Float[Tensor, "clip channel time"], audio_lens: Int[Tensor, " clip"]
    ) -> tuple[Float[Tensor, "clip frame hidden"], Int[Tensor, " clip"]]:
        """Features of windows of at most 30 s, and their true lengths → encoder frames and theirs.

        Without gradients when nothing in the encoder trains.
        """
        trains = any(parameter.requires_grad for parameter in self.audio_tower.parameters())
        with nullcontext() if trains else torch.no_grad():
            return self.audio_tower(audio_values.to(self.device), audio_lens.to(self.device))

    def project(
        self, frames: Float[Tensor, "clip frame hidden"], frame_lengths: Int[Tensor, " clip"]
    ) -> tuple[Float[Tensor, "clip token llm_hidden"], Int[Tensor, " clip"]]:
        """Encoder frames (zero past their lengths) → embeddings at the language model's rate."""
        frames, projector = self._mixed(frames), self.multi_modal_projector
        if isinstance(projector, CtcProjector):
            return projector(frames, frame_lengths, self.rows_of(projector.token_ids))
        return projector(frames, frame_lengths)

    def project_for_ctc(
        self, frames: Float[Tensor, "clip frame hidden"], frame_lengths: Int[Tensor, " clip"]
    ) -> tuple[Float[Tensor, "clip token llm_hidden"], Int[Tensor, " clip"]]:
        """`project`, or what a CTC projector scores against the rows: what the stage `align` trains."""
        projector = self.multi_modal_projector
        if isinstance(projector, CtcProjector):
            return projector.base(self._mixed(frames), frame_lengths)
        return self.project(frames, frame_lengths)

    def _mixed(self, frames: Tensor) -> Tensor:
        return frames if self.layer_mix is None else self.layer_mix(frames)

    def choose_rows(self, token_ids: Int[Tensor, " row"] | None) -> None:
        """Let a fresh CTC projector score these tokens' rows, or all (None). Other projectors score none."""
        projector = self.multi_modal_projector
        if isinstance(projector, CtcProjector):
            ids = torch.arange(len(self._table())) if token_ids is None else token_ids
            projector.choose_rows(ids, self.rows_of(ids))
            self.config.num_projector_rows = len(ids)

    def rows_of(self, token_ids: Int[Tensor, " row"]) -> Float[Tensor, "row hidden"]:
        """What the language model reads for these tokens; no gradient reaches its table."""
        with torch.no_grad():
            return self.get_input_embeddings()(token_ids.to(self.device))

    def embed(
        self,
        input_ids: Int[Tensor, "row token"],
        audio_embeddings: Float[Tensor, "clip audio_token hidden"] | None = None,
        token_lengths: Int[Tensor, " clip"] | None = None,
    ) -> Float[Tensor, "row token hidden"]:
        """Embeddings of a prompt, the audio in its placeholders.

        Raises:
            DataError: placeholders and audio differ in number; names the row.
        """
        is_audio = input_ids == self.config.audio_token_index
        # the placeholder's id may lie one past the table, so that it must never be looked up
        embeddings = self.get_input_embeddings()(input_ids.masked_fill(is_audio, 0))
        if self.audio_boundaries is not None:
            self._write_boundaries()
            embeddings = self.audio_boundaries(input_ids, embeddings)
        if audio_embeddings is None or token_lengths is None:
            if bool(is_audio.any()):
                row = int(is_audio.any(1).nonzero()[0])
                raise DataError(f"row {row} has {int(is_audio[row].sum())} <|audio|> positions, but no audio was given")
            return embeddings
        return fuse(embeddings, is_audio, audio_embeddings, token_lengths)

    def train_boundaries(self, token_ids: Sequence[int]) -> None:
        """Let the rows of these two tokens train, and no others of the table."""
        self.audio_boundaries = AudioBoundaries(self._table(), token_ids, self.embedding_scale())

    def _write_boundaries(self) -> None:
        assert self.audio_boundaries is not None
        self.audio_boundaries.write_into(self._table())

    def _table(self) -> Tensor:
        table: Any = self.get_input_embeddings()
        return table.weight

    def forward(
        self,
        input_ids: Int[Tensor, "row token"] | None = None,
        attention_mask: Tensor | None = None,
        audio_values: Float[Tensor, "clip channel time"] | None = None,
        audio_lens: Int[Tensor, " clip"] | None = None,
        audio_token_len: Int[Tensor, " clip"] | None = None,
        inputs_embeds: Float[Tensor, "row token hidden"] | None = None,
        labels: Int[Tensor, "row token"] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        audio_num_chunks: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Next-token logits, and the loss where labels are given.

        Args:
            input_ids: prompts, each clip's placeholder repeated as often as it has positions.
            attention_mask: True or 1 = keep, [row, past + token].
            audio_values: features of all windows of all rows, one after the other.
            audio_lens: their true lengths in time steps.
            audio_token_len: their language model positions, for comparison with what the encoder gives.
            inputs_embeds: instead of `input_ids`, as `embed` gives them.
            labels: the tokens themselves at their places, IGNORE_INDEX where nothing is supervised.
            past_key_values: of earlier tokens; audio then belongs to the new tokens only.
            logits_to_keep: 0 = all positions, n = the last n, a tensor = those positions.
            audio_num_chunks: windows of each clip; not needed here.

        Returns:
            With `labels`, `loss` is the mean over the supervised positions and `logits` are theirs only,
            [position, vocabulary]; otherwise [row, token, vocabulary].

        Raises:
            DataError: placeholders and audio differ in number.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise DataError("the model needs input_ids or inputs_embeds")
            audio = (audio_values, audio_lens, audio_token_len)
            inputs_embeds, mask = self.hear_prompt(input_ids, attention_mask, *audio)
            if self.multi_modal_projector.compresses:
                attention_mask = mask
                if position_ids is None:
                    position_ids = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        inputs = {
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            **kwargs,
        }
        if labels is None:
            return self.language_model(**inputs, logits_to_keep=logits_to_keep, return_dict=True)
        outputs = self.get_decoder()(**inputs, return_dict=True)
        logits, targets = self.supervised_logits(outputs.last_hidden_state, labels)
        count = max(1, len(targets))
        loss = F.cross_entropy(logits.float(), targets, reduction="sum") / count
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)

    def hear_prompt(
        self,
        input_ids: Int[Tensor, "row token"],
        attention_mask: Tensor | None = None,
        audio_values: Float[Tensor, "clip channel time"] | None = None,
        audio_lens: Int[Tensor, " clip"] | None = None,
        audio_token_len: Int[Tensor, " clip"] | None = None,
        **_: Any,
    ) -> tuple[Float[Tensor, "row token hidden"], Tensor]:
        """From what the processor returns to the language model's input, and the attention mask that goes with it.

        The mask is the given one, or ones. Where a projector compresses, it also leaves out the placeholders that the
        clips have no position for.

        Raises:
            DataError: placeholders, audio and `audio_token_len` differ in number.
        """
        input_ids = input_ids.to(self.device)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(self.device)
        if audio_values is None or audio_lens is None or len(audio_values) == 0:
            return self.embed(input_ids), mask
        audio_values, audio_lens = audio_values.to(self.device), audio_lens.to(self.device)
        frames, frame_lengths = self.encode_audio(audio_values, audio_lens)
        embeddings, token_lengths = self.project(frames, frame_lengths)
        planned = self.multi_modal_projector.token_lengths(frame_lengths)
        if audio_token_len is not None and audio_token_len.tolist() != planned.tolist():
            raise DataError(
                f"the clips have {planned.tolist()} positions, but audio_token_len says "
                f"{audio_token_len.tolist()}: the processor and the model differ in stack_factor "
                f"({self.config.stack_factor} here) or in the encoder"
            )
        if not self.multi_modal_projector.compresses:
            return self.embed(input_ids, embeddings, token_lengths), mask
        embeddings = F.pad(embeddings, (0, 0, 0, int(planned.max()) - embeddings.shape[1]))
        embedded = self.embed(input_ids, embeddings, planned)
        return embedded, leave_out(mask, input_ids == self.config.audio_token_index, planned, token_lengths)

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """See transformers. A projector that compresses is asked once, before: which placeholders it leaves out."""
        if not self.multi_modal_projector.compresses or kwargs.get("audio_values") is None:
            return super().generate(inputs, **kwargs)
        if kwargs.get("past_key_values") is not None:
            raise DataError(
                "generate() cannot go on from a cache with a projector that compresses: "
                "use ultravox.inference.conversation.Conversation"
            )
        input_ids = kwargs.pop("input_ids") if inputs is None else inputs
        names = (*_AUDIO_INPUTS, "audio_num_chunks", "attention_mask")
        embeddings, mask = self.hear_prompt(input_ids, **{name: kwargs.pop(name, None) for name in names})
        kwargs.setdefault("generation_config", self.generation_config)
        written = self.language_model.generate(inputs_embeds=embeddings, attention_mask=mask, **kwargs)
        answers = written if isinstance(written, Tensor) else written.sequences
        prompts = input_ids.to(answers.device).repeat_interleave(len(answers) // len(input_ids), dim=0)
        whole = torch.cat([prompts, answers], dim=1)
        if isinstance(written, Tensor):
            return whole
        written.sequences = whole
        return written

    def supervised_logits(
        self, hidden: Float[Tensor, "row token hidden"], labels: Int[Tensor, "row token"]
    ) -> tuple[Float[Tensor, "position vocabulary"], Int[Tensor, " position"]]:
        """Logits and targets of the positions whose NEXT token is supervised, and of no others."""
        supervised = labels[:, 1:] != IGNORE_INDEX
        return self.logits_of(hidden[:, :-1][supervised]), labels[:, 1:][supervised]

    def logits_of(self, hidden: Float[Tensor, "position hidden"]) -> Float[Tensor, "position vocabulary"]:
        """What the output layer makes of the decoder's states, scaled and capped as the language model has it."""
        logits = self.get_output_embeddings()(hidden)
        text = self.config.text_config
        if scaling := getattr(text, "logits_scaling", None):  # Granite
            logits = logits / scaling
        if scale := getattr(text, "logit_scale", None):  # Cohere
            logits = logits * scale
        if cap := getattr(text, "final_logit_softcapping", None):  # Gemma
            logits = cap * torch.tanh(logits / cap)
        return logits

    @property
    def output_layer_trains(self) -> bool:
        """Whether the output layer, or an adapter on it, has a gradient."""
        return any(parameter.requires_grad for parameter in self.get_output_embeddings().parameters())

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The audio goes in with the prompt only; of a prompt that is partly cached, only the new clips."""
        audio = {name: kwargs.pop(name, None) for name in (*_AUDIO_INPUTS, "audio_num_chunks")}
        inputs = super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, is_first_iteration=is_first_iteration, **kwargs
        )
        inputs.pop("audio_num_chunks", None)
        if is_first_iteration and audio["audio_values"] is not None:
            first = 0
            if next_sequence_length is not None and next_sequence_length < input_ids.shape[1]:
                first = self._num_cached_clips(input_ids[:, -next_sequence_length:], audio)
            inputs |= {name: audio[name][first:] for name in _AUDIO_INPUTS if audio[name] is not None}
        return inputs

    def _num_cached_clips(self, new_ids: Tensor, audio: dict[str, Tensor | None]) -> int:
        """How many of the clips belong to tokens in the cache: the first ones, if there are more than new places."""
        lengths = audio["audio_token_len"]
        if lengths is None:
            assert audio["audio_lens"] is not None
            lengths = num_audio_tokens(self.audio_tower.frame_lengths(audio["audio_lens"]), self.config.stack_factor)
        surplus = int(lengths.sum()) - int((new_ids == self.config.audio_token_index).sum())
        if surplus > 0 and len(new_ids) > 1:
            raise DataError("in a batch, a prompt that is partly cached takes the audio of its new tokens only")
        clip = 0
        while surplus > 0:
            surplus -= int(lengths[clip])
            clip += 1
        return clip

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        """Write the whole public form: both towers' weights, adapters merged into them, hashes of every file."""
        if self.audio_boundaries is not None:
            self._write_boundaries()
        state_dict = merged_state(self, self.state_dict() if state_dict is None else state_dict)
        state_dict.pop("audio_boundaries.weight", None)  # its rows are the table's by now
        super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)
        write_manifest(Path(save_directory))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a saved model, after its files' hashes.

        Raises:
            CheckpointError: a file that is not as it was saved.
        """
        if pretrained_model_name_or_path is not None and Path(pretrained_model_name_or_path).is_dir():
            verify_manifest(Path(pretrained_model_name_or_path))
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)


AutoModel.register(UltravoxConfig, UltravoxModel, exist_ok=True)
AutoModelForCausalLM.register(UltravoxConfig, UltravoxModel, exist_ok=True)
