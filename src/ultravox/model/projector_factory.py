"""The projector that a checkpoint's configuration asks for."""

from ultravox.audio.lengths import ENCODER_FRAMES_PER_SECOND, MAX_WINDOW_SECONDS
from ultravox.model.configuration import CTC_PROJECTORS, UltravoxConfig
from ultravox.model.ctc_projector import CtcProjector
from ultravox.model.projector import LinearProjector, MlpProjector, Projector, SwigluProjector
from ultravox.model.sequence_projectors import (
    ConvProjector,
    QFormerProjector,
    TransformerProjector,
    feed_forward_width,
)

#: A window of 30 s at 50 frames a second, and some more where a short rest lengthens it (`window_lengths`).
MAX_POSITIONS = ENCODER_FRAMES_PER_SECOND * (MAX_WINDOW_SECONDS + 1)


def projector_from_config(config: UltravoxConfig, encoder_width: int) -> Projector:
    """A fresh projector for an encoder whose frames have `encoder_width` channels."""
    output_width, factor, kind = config.text_config.hidden_size, config.stack_factor, config.projector_type
    if kind == "linear":
        return LinearProjector(encoder_width, output_width, factor, downsampling=config.downsampling)
    if kind == "mlp":
        return MlpProjector(encoder_width, config.hidden_size, output_width, factor, downsampling=config.downsampling)
    if kind == "conv":
        return ConvProjector(encoder_width, config.hidden_size, output_width, factor)
    if kind == "transformer":
        audio = config.audio_config
        return TransformerProjector(
            encoder_width,
            output_width,
            factor,
            num_layers=config.num_projector_layers,
            num_heads=audio.num_attention_heads,
            feed_forward_width=feed_forward_width(audio, encoder_width),
            max_positions=getattr(audio, "max_source_positions", None) or MAX_POSITIONS,
            downsampling=config.downsampling,
        )
    if kind == "qformer":
        return QFormerProjector(
            encoder_width,
            config.hidden_size,
            output_width,
            factor,
            num_layers=config.num_projector_layers,
            num_queries=config.num_projector_queries,
        )
    swiglu = SwigluProjector(
        encoder_width,
        config.hidden_size,
        output_width,
        factor,
        ln_mid=config.projector_ln_mid,
        norm_init=config.projector_init_value,
        downsampling=config.downsampling,
    )
    if kind in CTC_PROJECTORS:
        num_rows = config.num_projector_rows or config.text_config.vocab_size
        return CtcProjector(swiglu, output_width, num_rows, compresses=kind == "ctc_compressed")
    return swiglu
