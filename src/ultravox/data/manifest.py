"""Clips and the folders they lie in: ``dataset.json``, one JSON-lines file per split, and ``audio/``.

A row is ``{"id", "audio", "text", "duration", "speaker", "licence", "answer"}``; ``audio`` is relative to the folder of
the file, ``duration`` is in seconds, ``answer`` (optional) is what the language model itself answers to the text.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ultravox.audio.content import Audio
from ultravox.errors import DataError
from ultravox.files import atomic_write, sha256_file, ultravox_home

FORMAT_VERSION = 1
DATASET_FILE = "dataset.json"
BUNDLED_DATASETS = ("asterisk-en", "synthetic-en", "spoken-requests-en")


@dataclass(frozen=True, slots=True)
class Clip:
    """One row of a dataset: a recording and what is said in it; or several recordings; or, with `NO_AUDIO`, a text.

    A file's path is absolute, ``duration`` is in seconds, 0 without audio.
    """

    id: str
    audio: Audio
    text: str
    duration: float
    speaker: str = ""
    licence: str = ""
    answer: str | None = None
    language: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """What else the row holds, for prompt templates."""
    more_audio: tuple[tuple[Audio, float], ...] = ()
    """Further recordings of a conversation and their seconds, in the order in which it hears them."""
    messages: tuple[Mapping[str, str], ...] | None = None
    """A whole conversation: role and content of each turn, with a placeholder for each recording."""


def dataset_folder(source: str | Path) -> Path:
    """The folder of a bundled dataset's name, or of a path to a dataset folder. DataError when it is not there."""
    path = Path(source).expanduser()
    if str(source) in BUNDLED_DATASETS and not (path / DATASET_FILE).is_file():
        path = ultravox_home() / "data" / str(source)
        if not (path / DATASET_FILE).is_file():
            raise DataError(f"dataset {source} is not fetched yet: run `ultravox data fetch {source}`")
    if not path.exists():
        names = ", ".join(BUNDLED_DATASETS)
        raise DataError(f"no dataset {source}: expected one of {names}, a dataset or audio folder, or a .jsonl file")
    if not (path / DATASET_FILE).is_file():
        raise DataError(f"{path} is not a dataset folder: it has neither {DATASET_FILE} nor metadata.csv")
    return path.absolute()


def read_dataset(source: str | Path) -> dict[str, Any]:
    """The content of a dataset folder's ``dataset.json`` (name, licence, attribution, splits), or DataError."""
    path = dataset_folder(source) / DATASET_FILE
    try:
        info = json.loads(path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is not JSON: {error}; fetch the dataset again") from error
    if not isinstance(info, dict) or not isinstance(info.get("splits"), dict):
        raise DataError(f"{path} does not describe a dataset: expected an object with splits")
    if info.get("version") != FORMAT_VERSION:
        raise DataError(f"{path} has format version {info.get('version')!r}, this program reads {FORMAT_VERSION}")
    return info


def load_split(source: str | Path, split: str) -> list[Clip]:
    """The clips of one split of a bundled dataset or of a dataset folder. Errors (DataError) name the file and line."""
    folder, info = dataset_folder(source), read_dataset(source)
    if split not in info["splits"]:
        raise DataError(f"dataset {folder} has no split {split!r}: it has {', '.join(info['splits']) or 'none'}")
    entry = info["splits"][split]
    if not isinstance(entry, dict) or not isinstance(entry.get("file"), str):
        raise DataError(f"{folder / DATASET_FILE}: split {split!r} names no file")
    clips = read_rows(folder / entry["file"])
    if (digest := entry.get("sha256")) and sha256_file(folder / entry["file"]) != digest:
        raise DataError(
            f"{folder / entry['file']} is not the file that {DATASET_FILE} was written for (its SHA-256 differs): "
            "fetch the dataset again, or name the .jsonl file itself"
        )
    return clips


def is_whole(folder: str | Path) -> bool:
    """Whether a dataset folder is there and every split of it can be loaded; if not, it is worth making again."""
    try:
        for split in read_dataset(folder)["splits"]:
            load_split(folder, split)
    except DataError:
        return False
    return True


def write_dataset(
    folder: str | Path,
    *,
    name: str,
    licence: str,
    attribution: str,
    splits: Mapping[str, Sequence[Clip]],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write the splits' .jsonl files, then ``dataset.json``; the clips' audio lies in ``folder`` already.

    ``extra`` are further keys for ``dataset.json``. Each file is written whole or not at all.
    """
    folder = Path(folder).absolute()
    entries: dict[str, dict[str, Any]] = {}
    for split, clips in splits.items():
        path = folder / f"{split}.jsonl"
        atomic_write(path, "".join(json.dumps(_row(clip, folder), ensure_ascii=False) + "\n" for clip in clips))
        entries[split] = {
            "file": path.name,
            "sha256": sha256_file(path),
            "num_clips": len(clips),
            "seconds": round(sum(clip.duration for clip in clips), 3),
        }
    info = {"version": FORMAT_VERSION, "name": name, "licence": licence, "attribution": attribution, "splits": entries}
    atomic_write(folder / DATASET_FILE, json.dumps({**info, **(extra or {})}, indent=2, ensure_ascii=False) + "\n")


def _row(clip: Clip, folder: Path) -> dict[str, Any]:
    assert isinstance(clip.audio, Path)
    row = {
        "id": clip.id,
        "audio": clip.audio.relative_to(folder).as_posix(),
        "text": clip.text,
        "duration": round(clip.duration, 4),
        "speaker": clip.speaker,
        "licence": clip.licence,
    }
    if clip.answer is not None:
        row["answer"] = clip.answer
    if clip.language:
        row["language"] = clip.language
    return row | {key: value for key, value in clip.columns.items() if key not in row}


def read_rows(path: Path) -> list[Clip]:
    """The clips of a manifest: one JSON object a line, in our keys or in those of NeMo's manifests."""
    rows = ((place, _our_keys(row_of(line, place), place)) for place, line in read_lines(path))
    return collect(path, ((place, clip_of(row, path, place)) for place, row in rows))


def read_content(path: Path) -> bytes:
    """A manifest's bytes without a byte order mark, or a DataError."""
    try:
        return path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise DataError(f"cannot read the manifest {path}: {error.strerror}") from error


def read_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Place ("file, line 3") and content of each line that is not blank."""
    for number, line in enumerate(read_content(path).split(b"\n"), start=1):
        if line.strip():
            yield f"{path}, line {number}", line


def collect(path: Path, clips: Iterable[tuple[str, Clip]]) -> list[Clip]:
    """The clips of a file's places. DataError when two have one id, or there are none."""
    found: list[Clip] = []
    places: dict[str, str] = {}
    for place, clip in clips:
        if clip.id in places:
            raise DataError(f"{place}: id {clip.id!r} is already used in {places[clip.id].rpartition(', ')[2]}")
        places[clip.id] = place
        found.append(clip)
    if not found:
        raise DataError(f"{path} holds no clips")
    return found


def row_of(line: bytes, place: str) -> dict[str, Any]:
    """The JSON object of a line, or a DataError."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not a whole JSON object ({error.msg}, column {error.colno})") from error
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected a JSON object, got {type(row).__name__}")
    return row


def _our_keys(row: dict[str, Any], place: str) -> dict[str, Any]:
    """A row of a NeMo manifest (``audio_filepath``, ``text``, ``duration``) in our keys; any other row as it is."""
    if "audio_filepath" not in row or "audio" in row:
        return row
    if row.get("offset"):
        raise DataError(f"{place}: 'offset' is {row['offset']!r}, but only whole files can be read: cut the clip out")
    return {"id": row["audio_filepath"], **row, "audio": row["audio_filepath"]}


def clip_of(row: Mapping[str, Any], path: Path, place: str) -> Clip:
    """The clip of a row of a file at `path`, whose audio is relative to it. DataError with `place`."""
    for key in ("id", "audio", "text"):
        if key not in row:
            raise DataError(f"{place}: the key {key!r} is missing")
    for key in ("id", "audio", "text", "speaker", "licence", "answer"):
        if key in row and not isinstance(row[key], str) and not (key == "answer" and row[key] is None):
            raise DataError(f"{place}: {key!r} must be a string, got {row[key]!r}")
    audio = (path.absolute().parent / row["audio"]).resolve()
    if not audio.is_file():
        raise DataError(f"{place}: the audio file {audio} does not exist")
    duration = row["duration"] if "duration" in row else _duration(audio, place)
    if isinstance(duration, bool) or not isinstance(duration, int | float) or not 0 < duration < float("inf"):
        raise DataError(f"{place}: 'duration' must be a number of seconds above 0, got {duration!r}")
    return Clip(
        row["id"],
        audio,
        row["text"],
        float(duration),
        row.get("speaker", ""),
        row.get("licence", ""),
        row.get("answer"),
    )


def _duration(audio: Path, place: str) -> float:
    import soundfile

    try:
        return float(soundfile.info(audio).duration)
    except soundfile.SoundFileError as error:
        raise DataError(f"{place}: no 'duration', and the header of {audio} does not tell it; add the key") from error
