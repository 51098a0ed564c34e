"""Speech through a codec and back, in memory: what telephones, calls over the net and compressed files leave of it.

Every round trip keeps the number of samples and the time at which things are heard: FFmpeg says how many samples a
decoder has to skip, resampling has no delay, and what is left over at the end is cut.
"""

from collections.abc import Callable
from typing import Any, cast

import numpy as np

from ultravox.audio.lengths import SAMPLE_RATE
from ultravox.audio.signal import fast_length, fit

TELEPHONE_RATE = 8_000  # samples per second
TELEPHONE_HERTZ = (300.0, 3400.0)  # the voice band of ITU-T G.712
EDGE_HERTZ = 100.0  # over which the band begins and ends; a sharper edge would ring
MULAW_MU = 255.0  # ITU-T G.711
OPUS_BIT_RATES = (6_000, 12_000, 16_000, 24_000)  # bits per second; at 6,000 nothing above 4 kHz is left
MP3_BIT_RATES = (16_000, 24_000, 32_000, 64_000)  # MPEG-2, the layer III of 16 kHz
OPUS_OPTIONS = {"application": "voip", "compression_level": "5"}  # as a telephone would; 10 takes half as long again
MP3_OPTIONS = {"compression_level": "7"}


def mulaw(waveform: np.ndarray) -> np.ndarray:
    """8-bit μ-law at 8 kHz (ITU-T G.711's curve, not its table of segments): float32 [sample], at most ±1."""
    slow = np.clip(_resample(waveform, SAMPLE_RATE, TELEPHONE_RATE), -1.0, 1.0)
    companded = np.sign(slow) * np.log1p(MULAW_MU * np.abs(slow)) / np.log1p(MULAW_MU)
    coded = np.round(companded * 127.0)
    back = np.sign(coded) * np.expm1(np.abs(coded) / 127.0 * np.log1p(MULAW_MU)) / MULAW_MU
    return fit(_resample(back.astype(np.float32), TELEPHONE_RATE, SAMPLE_RATE), len(waveform))


def telephone(waveform: np.ndarray) -> np.ndarray:
    """The telephone's voice band, 300 to 3400 Hz, without shifting any of it in time.

    Sampled at 8 kHz such a band is whole, so that coming down to that rate and back would change nothing more.
    """
    low, high = TELEPHONE_HERTZ
    length = fast_length(len(waveform) + int(2 * SAMPLE_RATE / EDGE_HERTZ))  # so that the end does not reach the start
    hertz = np.fft.rfftfreq(length, 1 / SAMPLE_RATE)
    rise = np.clip((hertz - (low - EDGE_HERTZ)) / EDGE_HERTZ, 0, 1)
    fall = np.clip(((high + EDGE_HERTZ) - hertz) / EDGE_HERTZ, 0, 1)
    response = (np.sin(np.pi / 2 * rise) * np.sin(np.pi / 2 * fall)) ** 2
    spectrum = np.fft.rfft(waveform, length) * response.astype(np.float32)
    return np.fft.irfft(spectrum, length)[: len(waveform)].astype(np.float32)


def opus(waveform: np.ndarray, bit_rate: int) -> np.ndarray:
    """Opus (RFC 6716) in frames of 20 ms, as calls over the net use it: float32 [sample]."""
    decoded, rate = _round_trip(waveform, "libopus", "opus", "flt", bit_rate, OPUS_OPTIONS)
    return fit(_resample(decoded, rate, SAMPLE_RATE), len(waveform))


def mp3(waveform: np.ndarray, bit_rate: int) -> np.ndarray:
    """MP3 at 16 kHz: float32 [sample]."""
    decoded, rate = _round_trip(waveform, "libmp3lame", "mp3float", "fltp", bit_rate, MP3_OPTIONS)
    return fit(_resample(decoded, rate, SAMPLE_RATE), len(waveform))


def _any_of(rates: tuple[int, ...], codec: Callable[[np.ndarray, int], np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda waveform, share: codec(waveform, rates[int(share * len(rates))])


#: Codec → function of a waveform [sample] of at most ±1 and of a number in [0, 1) that chooses the bit rate.
CODECS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "mulaw": lambda waveform, share: mulaw(waveform),
    "telephone": lambda waveform, share: telephone(waveform),
    "opus": _any_of(OPUS_BIT_RATES, opus),
    "mp3": _any_of(MP3_BIT_RATES, mp3),
}


def _resample(waveform: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    import soxr

    return waveform if rate == new_rate else cast(np.ndarray, soxr.resample(waveform, rate, new_rate))


def _round_trip(
    waveform: np.ndarray, encoder_name: str, decoder_name: str, form: str, bit_rate: int, options: dict[str, str]
) -> tuple[np.ndarray, int]:
    """Encode and decode packet by packet, with no container: samples without the codec's delay, and their rate."""
    import av

    encoder: Any = av.CodecContext.create(encoder_name, "w")
    encoder.sample_rate, encoder.layout, encoder.format = SAMPLE_RATE, "mono", form
    encoder.bit_rate, encoder.options, encoder.thread_count = bit_rate, options, 1
    encoder.open()
    decoder: Any = av.CodecContext.create(decoder_name, "r")
    decoder.sample_rate, decoder.layout, decoder.thread_count = SAMPLE_RATE, "mono", 1
    if encoder.extradata:
        decoder.extradata = encoder.extradata
    samples = fit(waveform, max(len(waveform), encoder.frame_size))
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples[None], np.float32), format=form, layout="mono")
    frame.sample_rate, frame.pts = SAMPLE_RATE, 0
    packets = [*encoder.encode(frame), *encoder.encode(None), None]
    blocks = [decoded.to_ndarray()[0] for packet in packets for decoded in decoder.decode(packet)]
    return np.concatenate(blocks).astype(np.float32, copy=False), decoder.sample_rate
