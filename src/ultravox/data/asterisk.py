"""``asterisk-en``: the telephone prompts of Asterisk, read by Allison Smith, from two Debian packages.

Where there is no ``apt-get``, a synthesised stand-in takes the name, and says so.
"""

import gzip
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ultravox.data.manifest import Clip, is_whole, write_dataset
from ultravox.data.splits import is_heldout, normalise_text
from ultravox.errors import DataError, NetworkError
from ultravox.files import atomic_folder, explain_full_disk, make_folder, sha256_file, ultravox_home
from ultravox.packages import say_new_home, working

NAME = "asterisk-en"
LICENCE = "CC-BY-SA-3.0"
SPEAKER = "Allison Smith"
ATTRIBUTION = (
    "Asterisk core sounds, English. Copyright 2003-2010 Allison Smith (http://www.theivrvoice.com), financial "
    "contributions by Digium, Inc. (http://www.digium.com). Licensed under the Creative Commons "
    "Attribution-ShareAlike 3.0 licence (https://creativecommons.org/licenses/by-sa/3.0/). Changes made: decoded from "
    "G.722 to 16 kHz FLAC."
)
SAMPLE_RATE = 16_000  # of G.722
TRANSCRIPTS = "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
SOUNDS = "usr/share/asterisk/sounds/en_US_f_Allison"
# What the published figures were measured on. apt checks signatures itself; other content is used, and said so.
PACKAGES = {
    "asterisk-core-sounds-en-g722": "38c5261820b406dcb0ecb37675720da2b0864850690690352ca52707eb623806",
    "asterisk-core-sounds-en": "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50",
}


@dataclass(frozen=True, slots=True)
class Transcript:
    """A line of the transcripts: the sound file's name without ending (``digits/1``) and the words spoken."""

    name: str
    text: str


def parse_transcripts(content: str) -> list[Transcript]:
    """Lines ``name: words``; ``;`` starts a comment. Notes in brackets are not speech: ``[beep]``, ``<beep>``, ``(…)``.

    Errors: DataError naming the line.
    """
    transcripts = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip() or line.startswith(";"):
            continue
        name, colon, text = line.partition(":")
        if not colon or not name.strip():
            raise DataError(f"Asterisk transcripts, line {number}: expected `name: words`, got {line[:60]!r}")
        text = re.sub(r"\[[^\]]*\]|<[^>]*>|\([^)]*\)", " ", text)
        transcripts.append(Transcript(name.strip(), " ".join(text.split())))
    return transcripts


def decode_g722(path: Path) -> np.ndarray:
    """A raw G.722 file as float32 samples [sample] at 16 kHz."""
    import av

    with av.open(str(path), format="g722") as container:
        blocks = [frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)]
    if not blocks:
        raise DataError(f"{path} holds no sound")
    return np.concatenate(blocks).astype(np.float32) / 32768


def fetch_asterisk_en(stand_in: Callable[[Path], None] | None = None) -> Path:
    """The dataset folder, made on first use. ``stand_in`` fills a folder where ``apt-get`` does not exist.

    Errors: NetworkError when the packages cannot be downloaded, DataError when their content is not as expected.
    """
    folder = ultravox_home() / "data" / NAME
    if is_whole(folder):
        return folder
    missing = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        _make_stand_in(folder, missing[0], stand_in)
        return folder
    say_new_home()
    make_folder(folder.parent)
    with explain_full_disk(folder), tempfile.TemporaryDirectory(dir=folder.parent, prefix=".asterisk.") as temporary:
        packages = download_packages(list(PACKAGES), Path(temporary))
        for package in packages.values():
            _run(["dpkg-deb", "-x", str(package), f"{temporary}/tree"], NetworkError)
        with atomic_folder(folder) as target:
            build_dataset(
                Path(temporary) / "tree", target, {name: sha256_file(path) for name, path in packages.items()}
            )
    return folder


def build_dataset(tree: Path, folder: Path, sources: dict[str, str]) -> None:
    """Write the dataset into ``folder`` from the unpacked packages; ``sources`` are their names and SHA-256."""
    import soundfile
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    clips: dict[str, list[Clip]] = {"train": [], "heldout": []}
    wordless, absent = [], []
    transcripts = parse_transcripts(gzip.decompress((tree / TRANSCRIPTS).read_bytes()).decode("utf-8"))
    (folder / "audio").mkdir()
    for transcript in track(transcripts, description=f"decoding {NAME}", console=console, transient=True):
        source = tree / SOUNDS / f"{transcript.name}.g722"
        if not normalise_text(transcript.text):
            wordless.append(transcript.name)
        elif not source.is_file():
            absent.append(transcript.name)
        else:
            identifier = transcript.name.replace("/", "-")
            audio = folder / "audio" / f"{identifier}.flac"
            waveform = decode_g722(source)
            soundfile.write(audio, waveform, SAMPLE_RATE, subtype="PCM_16")
            split = "heldout" if is_heldout(transcript.text) else "train"
            duration = len(waveform) / SAMPLE_RATE
            clips[split].append(Clip(identifier, audio, transcript.text, duration, SPEAKER, LICENCE))
    if not clips["train"] or not clips["heldout"]:
        raise DataError(f"the Asterisk packages hold no clips: no .g722 files under {SOUNDS}; report this")
    skipped = {"without words": wordless, "without a sound file": absent}
    for reason, names in skipped.items():
        if names:
            console.print(f"{NAME}: skipped {len(names)} {reason}: {', '.join(names)}", highlight=False)
    if sources != PACKAGES:
        console.print(
            f"{NAME}: these Debian packages are not the ones the published figures were measured on; "
            "compare word error rates with care",
            style="bold yellow",
        )
    write_dataset(
        folder,
        name=NAME,
        licence=LICENCE,
        attribution=ATTRIBUTION,
        splits=clips,
        extra={"sources": sources, "skipped": skipped},
    )


def download_packages(names: list[str], folder: Path) -> dict[str, Path]:
    """Debian packages as files in ``folder``, by ``apt-get download``; needs no root.

    Where the machine has no package lists yet, they are fetched into a private place, so that nothing changes there.
    """
    private: list[str] = []
    for attempt in ("own lists", "private lists"):
        if attempt == "private lists":
            for part in ("lists/partial", "cache/archives/partial"):
                (folder / part).mkdir(parents=True)
            private = ["-o", f"Dir::State::Lists={folder}/lists", "-o", f"Dir::Cache={folder}/cache"]
            with working("fetching Debian's package lists"):
                _run(["apt-get", *private, "-q", "-o", "APT::Update::Error-Mode=any", "update"], NetworkError)
        with working(f"downloading Debian packages {', '.join(names)} to {ultravox_home() / 'data'}"):
            try:
                _run(["apt-get", *private, "-q", "download", *names], NetworkError, folder)
            except NetworkError:
                if attempt == "private lists":
                    raise
        found = {name: next(iter(folder.glob(f"{name}_*.deb")), None) for name in names}
        packages = {name: path for name, path in found.items() if path is not None}
        if len(packages) == len(names):
            return packages
    raise NetworkError(f"apt-get downloaded none of {', '.join(names)}")


def _run(command: list[str], error_type: type[Exception], folder: Path | None = None) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)
        output = done.stderr.splitlines() + done.stdout.splitlines()
        failed = done.returncode != 0
    except (subprocess.TimeoutExpired, OSError) as error:
        output, failed = [str(error)], True
    if failed:
        reasons = [line for line in output if line.startswith("E:") or "error" in line] or output or ["no reason given"]
        tool = " ".join(part for part in command if part in ("apt-get", "dpkg-deb", "update", "download", "-x"))
        raise error_type(
            f"`{tool}` failed ({reasons[0].strip()}): connect to the network for this first use of {NAME}; "
            "it comes from the Debian archive and works offline afterwards"
        )


def _make_stand_in(folder: Path, tool: str, stand_in: Callable[[Path], None] | None) -> None:
    from rich.console import Console

    message = f"{NAME} comes from Debian packages and `{tool}` does not exist here"
    if stand_in is None:
        raise DataError(f"{message}: use a Debian or Ubuntu machine, or copy {folder} from one")
    Console(stderr=True).print(
        f"{message}: a SYNTHETIC stand-in is made instead. Word error rates on it are NOT those of human speech.",
        style="bold red",
    )
    with atomic_folder(folder) as target:
        stand_in(target)
