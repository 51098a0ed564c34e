"""Lhotse's CutSets (``cuts.jsonl.gz``) and Shar folders. Needs the extra ``lhotse``.

A cut is a part of a recording; its supervisions hold what is said. A cut that is a whole file becomes that file, any
other an `AudioSegment`. In a Shar folder the audio lies in tar files, where `TarMember` remembers its place.
"""

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultravox.audio.content import Audio
from ultravox.audio.segment import SLACK_SECONDS, AudioSegment
from ultravox.data.clip import RowFault, RowReader
from ultravox.data.source import Row, Source, SourceSpec
from ultravox.errors import AudioError, DataError

CUTS_SUFFIXES = (".jsonl.gz", ".jsonl")
SHAR_CUTS = re.compile(r"cuts\.(\d+)\.jsonl(\.gz)?")
ROOT_SPLIT = "train"  # of shards that lie beside no split's folder


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file inside an uncompressed tar file, by its place there."""

    tar: Path
    offset: int
    num_bytes: int
    name: str

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    def read(self) -> bytes:
        """The content. AudioError when the tar file is missing or shorter."""
        try:
            with self.tar.open("rb") as file:
                file.seek(self.offset)
                content = file.read(self.num_bytes)
        except OSError as error:
            raise AudioError(f"{self} cannot be read: {error.strerror}") from error
        if len(content) != self.num_bytes:
            raise AudioError(f"{self} is truncated: copy the tar file again")
        return content

    def __str__(self) -> str:
        return f"{self.name} in {self.tar.name}"


class LhotseSource(Source):
    """A file of cuts, a folder of such files (each a split), or a Shar folder, or a folder of those."""

    def __init__(self, spec: SourceSpec) -> None:
        super().__init__(spec)
        self.root = spec.path if spec.path.is_dir() else spec.path.parent

    def splits(self) -> list[str]:
        found = lhotse_splits(self.spec.path)
        if not found:
            raise DataError(f"{self.name} holds no cuts: expected a .jsonl.gz file of cuts, or a Shar folder")
        return list(found)

    def rows(self) -> Iterator[Row]:
        found = lhotse_splits(self.spec.path)
        if self.spec.path.is_file():
            self.require_file()
            place = self.spec.path
        elif self.spec.split in self.splits():
            place = found[self.spec.split]
        else:
            raise DataError(f"{self.name} has no split {self.spec.split!r}: it has {', '.join(found)}")
        reader = RowReader(self.columns, lambda audio: audio, self.spec.needs_audio)
        pairs = _shar_cuts(place) if place.is_dir() else ((cut, None) for cut in _cuts(place))
        row: dict[str, Any] = {}
        for index, (cut, member) in enumerate(pairs):
            here = f"{place}, cut {cut.id}"
            try:
                row = _columns_of(cut, _audio_of(cut, member, place, here))
                if index == 0:
                    self.columns.require_essential(row, here)
                yield here, reader.clip(row, here)
            except RowFault as fault:
                yield here, fault
        if row:
            self.columns.require_seen(str(place), row)


def lhotse_splits(path: Path) -> dict[str, Path]:
    """Split → file of cuts or Shar folder; empty where there is none."""
    if path.is_file():
        return {path.name.partition(".")[0]: path} if path.name.endswith(CUTS_SUFFIXES) else {}
    if _shards(path):
        return {ROOT_SPLIT: path}
    below = {folder.name: folder for folder in sorted(path.glob("*/")) if folder.is_dir() and _shards(folder)}
    return below or {file.name.partition(".")[0]: file for file in sorted(path.glob("*cuts*.jsonl.gz"))}


def _shards(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("cuts.*") if SHAR_CUTS.fullmatch(path.name))


def _cuts(path: Path) -> Iterator[Any]:
    """The cuts of a file, one by one."""
    try:
        from lhotse import CutSet
    except ImportError as error:
        raise DataError(f"{path} is Lhotse's: install the extra, pip install 'ultravox[lhotse]'") from error
    number = 0
    try:
        for cut in CutSet.from_file(path):
            number += 1
            yield cut
    except (OSError, EOFError, ValueError, KeyError, TypeError, AssertionError) as error:
        what = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}, line {number + 1}: not one of Lhotse's cuts ({what})") from error
    if not number:
        raise DataError(f"{path} holds no clips")


def _shar_cuts(folder: Path) -> Iterator[tuple[Any, TarMember | None]]:
    """Each cut of a Shar folder with its audio, which stands in the same order in the tar file of the same number."""
    for path in _shards(folder):
        match = SHAR_CUTS.fullmatch(path.name)
        assert match is not None
        tar = folder / f"recording.{match[1]}.tar"
        if not tar.is_file():
            raise DataError(f"{path} needs the audio in {tar.name} beside it, which is not there")
        members = _members(tar)
        for cut in _cuts(path):
            member = next(members, None)
            if member is None:
                raise DataError(f"{tar} ends before the cuts of {path.name} do: write the Shar folder again")
            stem = Path(member.name).stem
            if stem not in (cut.id, str(cut.id).rpartition("/")[2]):
                raise DataError(f"{tar} holds {member.name} where {path.name} has the cut {cut.id}: write it again")
            yield cut, member if member.num_bytes else None


def _members(tar: Path) -> Iterator[TarMember]:
    """The data files of a Shar's tar, in order; the description that follows each is left out."""
    try:
        with tarfile.open(tar, "r:") as archive:
            for info in archive:
                if info.isfile() and Path(info.name).suffix not in (".json", ".nometa"):
                    size = 0 if info.name.endswith(".nodata") else info.size
                    yield TarMember(tar, info.offset_data, size, info.name)
    except (tarfile.TarError, OSError) as error:
        raise DataError(
            f"{tar} is not a whole, uncompressed tar file ({error}): write the Shar folder again"
        ) from error


def _columns_of(cut: Any, audio: Audio | None) -> dict[str, Any]:
    """A cut as a row; its supervisions' texts are joined in the order in which they are spoken."""
    spoken = sorted(cut.supervisions, key=lambda supervision: supervision.start)

    def only(name: str) -> Any:
        values = {getattr(supervision, name) for supervision in spoken}
        return values.pop() if len(values) == 1 else None

    custom: dict[str, Any] = {}
    for holder in (*spoken, cut):
        custom |= {key: value for key, value in (holder.custom or {}).items() if not isinstance(value, bytes)}
    own = {
        "id": cut.id,
        "audio": audio,
        "text": " ".join(supervision.text for supervision in spoken if supervision.text),
        "duration": cut.duration if audio is not None else None,
        "speaker": only("speaker"),
        "language": only("language"),
        "gender": only("gender"),
    }
    return custom | own


def _audio_of(cut: Any, member: TarMember | None, place: Path, here: str) -> Audio | None:
    """Where a cut is to be heard. RowFault where that cannot be said, as of a mixture."""
    recording = getattr(cut, "recording", None)
    if type(cut).__name__ not in ("MonoCut", "MultiCut") or (recording is not None and recording.transforms):
        raise RowFault("no plain cut", cut.id, f"{here}: mixed, padded or changed cuts must be saved as audio first")
    if recording is None or (member is None and recording.sources[0].type == "shar"):
        return None
    source = recording.sources[0]
    audio: Audio
    if member is not None:
        audio = member
    elif source.type == "file" and len(recording.sources) == 1:
        found = [path for path in (Path(source.source), place.parent / source.source) if path.is_file()]
        if not found:
            raise RowFault("missing audio", cut.id, f"{here}: the audio file {source.source} does not exist")
        audio = found[0].absolute()
    else:
        raise RowFault("no plain cut", cut.id, f"{here}: audio of the type {source.type!r} cannot be read from here")
    channels = source.channels or [0]
    wanted = cut.channel if isinstance(cut.channel, int) and len(channels) > 1 else None
    whole = cut.start <= SLACK_SECONDS / 10 and abs(cut.duration - recording.duration) < SLACK_SECONDS
    if whole and wanted is None:
        return audio
    return AudioSegment(audio, float(cut.start), float(cut.duration), wanted)
