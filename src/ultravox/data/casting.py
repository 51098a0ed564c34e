"""Which voices speak, by what the user calls them, and which of them reads which text."""

import difflib
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from ultravox.data.endpoints import Endpoint
from ultravox.data.speak import MakeVoice
from ultravox.data.voices import (
    EndpointVoice,
    EspeakVoice,
    HibariVoice,
    PiperVoice,
    fetch_joe,
    read_piper_config,
    require_packages,
    run_espeak,
)
from ultravox.errors import DataError
from ultravox.files import sha256_file

BUNDLED = ("piper-joe", "hibari-heart")
NOT_STATED = "not stated"
KINDS = f"{', '.join(BUNDLED)}, a Piper model (FILE.onnx or FILE.onnx:SPEAKER), espeak-ng:VOICE or openai:VOICE"
# Loading Piper's model costs as much as six readings; a process or a request costs the same whatever was before it.
MODEL_SHARD, REQUEST_SHARD = 64, 1


@dataclass(frozen=True, slots=True)
class CastVoice:
    """A voice that is ready to be made, and what the rows say about it."""

    name: str
    engine: str
    engine_version: str
    licence: str
    make: MakeVoice
    shard_size: int
    """Readings by one voice object, all of which are made again when one is missing."""
    source: Mapping[str, str] = field(default_factory=dict)

    def settings(self) -> dict[str, str]:
        """What decides its speech, apart from the seed."""
        described = {"name": self.name, "engine": self.engine, "engine_version": self.engine_version}
        return {**described, "licence": self.licence, **self.source}


def cast_voice(name: str, licence: str = NOT_STATED, endpoint: Endpoint | None = None) -> CastVoice:
    """The voice of a name.

    Args:
        name: one of KINDS.
        licence: of a voice that is not bundled.
        endpoint: the server of "openai:" voices.

    Raises:
        DataError: no such voice.
        ModelError: a package, a program or a file is missing.
    """
    if name == "piper-joe":
        require_packages("piper")
        fetch_joe()  # before the threads, which would each download it
        return CastVoice(name, "piper", version("piper-tts"), "CC0-1.0", PiperVoice, MODEL_SHARD)
    if name == "hibari-heart":
        require_packages("hibari")
        return CastVoice(name, "hibari", version("hibari-tts"), "Apache-2.0", HibariVoice, MODEL_SHARD)
    if match := re.fullmatch(r"(.+\.onnx)(?::(\d+))?", name):
        return _piper_model(Path(match[1]).expanduser(), match[2], licence)
    kind, _, voice = name.partition(":")
    if kind == "espeak-ng" and voice:
        return _espeak(voice, licence)
    if kind == "openai" and voice:
        if endpoint is None:
            raise DataError(f"the voice {name} needs a server: give --speech-url and --speech-model")
        source = {"url": endpoint.url}
        return CastVoice(
            f"{endpoint.model}-{voice}",
            "openai",
            endpoint.model,
            licence,
            lambda seed: EndpointVoice(seed, endpoint, voice),
            REQUEST_SHARD,
            source,
        )
    close = difflib.get_close_matches(name, BUNDLED, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]}? There are" if close else "expected"
    raise DataError(f"no voice {name!r}: {hint} {KINDS}")


def _piper_model(path: Path, speaker: str | None, licence: str) -> CastVoice:
    require_packages("piper")
    if not path.is_file():
        raise DataError(f"no voice {path}: there is no such file")
    num_speakers = read_piper_config(path)["num_speakers"]
    if speaker is not None and int(speaker) >= num_speakers:
        raise DataError(f"no voice {path}:{speaker}: the model has {num_speakers} speakers, counted from 0")
    number = None if speaker is None else int(speaker)
    return CastVoice(
        f"piper-{path.stem}" + (f":{number}" if number is not None else ""),
        "piper",
        version("piper-tts"),
        licence,
        lambda seed: PiperVoice(seed, path, number),
        MODEL_SHARD,
        {"sha256": sha256_file(path)},
    )


def _espeak(voice: str, licence: str) -> CastVoice:
    printed = run_espeak(["--version"])
    found = re.search(r"\d+(?:\.\d+)+\S*", printed)
    try:
        run_espeak(["-v", voice, "-q", "--stdin"], "a")
    except DataError as error:
        raise DataError(f"no voice espeak-ng:{voice} ({error}): `espeak-ng --voices` lists them") from error
    return CastVoice(
        f"espeak-ng-{voice}",
        "espeak-ng",
        found[0] if found else printed.strip(),
        licence,
        lambda seed: EspeakVoice(seed, voice),
        REQUEST_SHARD,
    )


def draw_readings(
    text: str, voices: Sequence[CastVoice], speeds: Sequence[float], count: int | None, seed: int
) -> list[tuple[int, float]]:
    """Number of a voice, and speed, of each reading of a text: all pairs, or `count` drawn by the text and the seed.

    The draw of one text does not depend on the other texts.
    """
    pairs = [(number, speed) for number in range(len(voices)) for speed in speeds]
    if count is None or count >= len(pairs):
        return pairs

    def draw(pair: tuple[int, float]) -> str:
        return hashlib.sha256(f"{seed}\n{voices[pair[0]].name}\n{pair[1]:g}\n{text}".encode()).hexdigest()

    return sorted(sorted(pairs, key=draw)[:count])


def shard_seed(seed: int, voice: str, part: int) -> int:
    """The seed of the part-th shard of a voice's readings: 31 bits of a hash."""
    return int(hashlib.sha256(f"{seed}\n{voice}\n{part}".encode()).hexdigest()[:8], 16) >> 1
