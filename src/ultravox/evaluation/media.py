"""Pictures and sound small enough to lie inside one HTML file: paletted PNG and Ogg/Opus, as ``data:`` addresses."""

import base64
import io
import struct
import zlib

import numpy as np
import soundfile

from ultravox.audio.lengths import SAMPLE_RATE

# Anchor colours of matplotlib's magma (CC0): dark to light, and ordered in grey as well.
_MAGMA = np.array(
    [
        (0, 0, 4), (20, 14, 54), (59, 15, 112), (100, 26, 128), (140, 41, 129), (183, 55, 121), (222, 73, 104),
        (247, 112, 92), (254, 159, 109), (254, 207, 146), (252, 253, 191),
    ]
)  # fmt: skip


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(values: np.ndarray) -> bytes:
    """A paletted PNG of an array [row, column], scaled from its least to its greatest value; row 0 is on top."""
    low, high = float(values.min()), float(values.max())
    pixels = np.round((values - low) * (255 / max(high - low, 1e-9))).astype(np.uint8)
    places = np.linspace(0, len(_MAGMA) - 1, 256)
    palette = np.stack([np.interp(places, range(len(_MAGMA)), channel) for channel in _MAGMA.T], axis=1)
    height, width = pixels.shape
    scanlines = np.zeros((height, width + 1), np.uint8)  # each line begins with its filter: 0, none
    scanlines[:, 1:] = pixels
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)  # 8 bits a pixel, palette
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"PLTE", palette.round().astype(np.uint8).tobytes())
        + _chunk(b"IDAT", zlib.compress(scanlines.tobytes(), 9))
        + _chunk(b"IEND", b"")
    )


def log_mel_png(log_mel: np.ndarray) -> bytes:
    """A picture of a log-mel spectrogram [mel, frame], low frequencies at the bottom, one pixel for each value."""
    return png(np.asarray(log_mel)[::-1])


def compressed_audio(waveform: np.ndarray) -> tuple[bytes, str]:
    """A 16 kHz waveform [sample] as Ogg/Opus, or FLAC where the sound library cannot write Opus; and its media type."""
    if "OPUS" in soundfile.available_subtypes("OGG"):
        file_format, subtype, media_type = "OGG", "OPUS", "audio/ogg"
    else:
        file_format, subtype, media_type = "FLAC", "PCM_16", "audio/flac"
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", SAMPLE_RATE, 1, subtype, format=file_format) as file:
        for start in range(0, len(waveform), SAMPLE_RATE):  # libsndfile's Ogg writer overflows its stack on long blocks
            file.write(np.clip(waveform[start : start + SAMPLE_RATE], -1, 1))
    return buffer.getvalue(), media_type


def data_uri(content: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
