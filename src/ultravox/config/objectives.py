"""Configuration of what a stage learns: the options of the objectives `align` and `tune`."""

from typing import Literal

from pydantic import Field, model_validator

from ultravox.config.section import Name, Section, Share, misfit


class AlignOptions(Section):
    """Objective `align`: CTC through the language model's own embedding rows."""

    match_weight: float = Field(
        0.5, ge=0, le=100, description="weight of pulling each position towards its expected embedding row, beside CTC"
    )
    vocabulary: Literal["transcripts"] = Field(
        "transcripts", description="which rows CTC chooses among: those of the tokens that occur in the transcripts"
    )


class DistillationOptions(Section):
    """Divergence from a teacher: the same language model without adapters, which reads the transcript."""

    weight: float = Field(0.0, ge=0, le=100, description="of the divergence beside the cross-entropy; 0 = none")
    temperature: float = Field(2.0, gt=0, le=100, description="T; the divergence at T is multiplied by T²")
    end_of_turn_weight: float = Field(
        1.0, ge=0, le=100, description="what the position of the answer's end token counts, beside the others' 1"
    )
    teacher_cache_gb: float = Field(
        1.0, ge=0, description="memory for what the teacher said of earlier texts; changes no result; 0 = none"
    )


class EndOfAudioOptions(Section):
    """Learning where the speaker has finished, from whole clips and from clips that are cut short."""

    variant: Literal["none", "early", "late", "head"] = Field(
        "none",
        description="early = the language model says `end_text` at the last audio positions and `middle_text` before "
        "them; late = the answer ends in `end_suffix`, that of a cut clip is `cut_text`; head = a classifier on the "
        "audio positions",
    )
    weight: float = Field(
        1.0, gt=0, le=100, description="early, head: what an audio position counts beside a supervised token's 1"
    )
    cut_share: Share = Field(0.5, description="share of the clips that are cut short; these are the negatives")
    pause_share: Share = Field(0.5, description="share of the cuts that fall into a pause, where the clip has one")
    last_positions: int = Field(1, ge=1, le=1000, description="early, head: positions at the end that count as the end")
    middle_positions: int | None = Field(
        None, ge=1, description="early, head: so many random positions before them count; null = all"
    )
    end_text: Name = Field(" end", description="early: one token of the language model")
    middle_text: Name = Field("...", description="early: one token of the language model")
    end_suffix: Name = Field(" [END]", description="late: after the answer to a whole clip")
    cut_text: Name = Field("[...]", description="late: the answer to a clip that was cut")

    @property
    def active(self) -> bool:
        """Whether anything of it is learnt."""
        return self.variant != "none"


class NextFrameOptions(Section):
    """Predicting the audio to come, from the language model's state at an audio position."""

    weight: float = Field(0.0, ge=0, le=100, description="what a position counts beside a supervised token's 1; 0 = no")
    form: Literal["regression", "contrastive"] = Field(
        "regression",
        description="regression = L1 + L2 (APC); contrastive = telling the frame from others of the batch (InfoNCE, "
        "CPC)",
    )
    target: Literal["log_mel", "encoder"] = Field(
        "log_mel",
        description="log_mel = the position's spectrogram; encoder = the frozen encoder's frames of the unmasked "
        "audio, normalised",
    )
    steps_ahead: int = Field(1, ge=1, le=100, description="positions between where it is said and what is said")
    mask_share: Share = Field(
        0.0,
        description="share of each clip's positions that are hidden from the encoder; only these are predicted. "
        "An encoder that hears both ways tells the rest itself",
    )
    mask_positions: int = Field(5, ge=1, le=1000, description="positions in a row that are hidden together")
    num_negatives: int = Field(50, ge=1, le=10_000, description="contrastive: other frames beside the right one")
    similarity_temperature: float = Field(0.1, gt=0, le=100, description="contrastive: divides the cosine similarities")

    def require_still_target(self, name: str, key: str, encoder_trains: bool) -> None:
        """Refuse to predict frames that training can make predictable: of an encoder that trains.

        Args:
            name: of the stage.
            key: of the stage.
            encoder_trains: whether anything in the audio encoder does.
        """
        if self.weight > 0 and self.target == "encoder" and encoder_trains:
            raise misfit(
                f"stage {name!r}: next_frame.target encoder needs a frozen audio encoder: one that trains could make "
                "all its frames alike, which are easily predicted; set target: log_mel",
                f"{key}.tune.next_frame.target",
                "model.train_audio_encoder",
                "model.audio_encoder_lora.rank",
            )


class TuneOptions(Section):
    """Objective `tune`: next tokens through the language model, and what is learnt beside them."""

    loss_mask: Literal["response", "after_audio", "all_text", "assistant_turns"] = Field(
        "response",
        description="where the loss counts: the last answer and its end token, all that follows the audio, "
        "all text, or what the assistant says in any turn",
    )
    cross_entropy_weight: float = Field(1.0, ge=0, le=100, description="of the cross-entropy with the text; 0 = none")
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="share of each target spread evenly over the vocabulary"
    )
    z_loss_weight: float = Field(
        0.0, ge=0, le=1, description="of the squared log-normaliser, which keeps logits from growing; 1e-4 is usual"
    )
    distillation: DistillationOptions = Field(
        default_factory=DistillationOptions, description="learning from the language model as it reads the transcript"
    )
    end_of_audio: EndOfAudioOptions = Field(
        default_factory=EndOfAudioOptions, description="learning where the speaker has finished"
    )
    next_frame: NextFrameOptions = Field(default_factory=NextFrameOptions, description="predicting the audio to come")
    boundary_share: Share | None = Field(
        None,
        description="with model.audio_boundaries: share of the clips that stand between the two tokens; null = all",
    )

    @model_validator(mode="after")
    def _check(self) -> "TuneOptions":
        self._without_effect()
        ends_in_audio = self.end_of_audio.variant in ("early", "head")
        if not self.cross_entropy_weight and not self.distillation.weight and not ends_in_audio:
            raise misfit(
                "cross_entropy_weight and distillation.weight are both 0, so that nothing is learnt of the text: raise "
                "one of them",
                "cross_entropy_weight",
                "distillation.weight",
            )
        if not self.cross_entropy_weight and self.label_smoothing:
            raise misfit("label_smoothing is of the cross-entropy, whose weight is 0; drop it", "label_smoothing")
        if self.distillation.weight and self.loss_mask in ("after_audio", "all_text"):
            raise misfit(
                f"distillation compares answers, which teacher and student share, but loss_mask is {self.loss_mask!r}: "
                "use response or assistant_turns",
                "loss_mask",
                "distillation.weight",
            )
        ending = self.end_of_audio
        if ending.active and ending.cut_share in (0, 1):
            what = "no cut clip, so that it has no negatives" if ending.cut_share == 0 else "no whole clip"
            raise misfit(
                f"end_of_audio ({ending.variant}) sees {what}: set cut_share between 0 and 1, such as 0.5",
                "end_of_audio.cut_share",
                "end_of_audio.variant",
            )
        if ending.active and self.distillation.weight:
            raise misfit(
                "the teacher of the distillation reads whole transcripts, and end_of_audio cuts clips: use one of them "
                "in a stage",
                "end_of_audio.variant",
                "distillation.weight",
            )
        if ending.active and self.loss_mask != "response":
            raise misfit(
                f"end_of_audio is about the answer, but loss_mask is {self.loss_mask!r}: use response",
                "loss_mask",
                "end_of_audio.variant",
            )
        if self.next_frame.weight and not self.next_frame.mask_share:
            raise misfit(
                "next_frame has mask_share 0: the audio encoders hear both ways, so that each frame already tells the "
                "ones after it and there is nothing to predict; set mask_share, such as 0.3",
                "next_frame.mask_share",
                "next_frame.weight",
            )
        return self

    def _without_effect(self) -> None:
        """Options of what is off are refused: whoever sets them means to have it on."""
        for name, switch, is_on in (
            ("distillation", "weight", self.distillation.weight > 0),
            ("end_of_audio", "variant", self.end_of_audio.active),
            ("next_frame", "weight", self.next_frame.weight > 0),
        ):
            section = getattr(self, name)
            changed = [key for key, value in type(section)() if getattr(section, key) != value and key != switch]
            if changed and not is_on:
                raise misfit(
                    f"{name}.{changed[0]} has no effect while {name}.{switch} is {getattr(section, switch)!r}: set "
                    "that too, or drop it",
                    f"{name}.{changed[0]}",
                    f"{name}.{switch}",
                )

    @property
    def decodes(self) -> bool:
        """Whether clips are cut or hidden in part, anew in each epoch: then no encoder's frames can be kept."""
        return self.end_of_audio.active or self.next_frame.weight > 0
