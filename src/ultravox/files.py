"""Files that are whole or absent: atomic writes, locks, hashes, and the one folder that everything is cached under."""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ultravox.errors import UltravoxError

_NO_ROOM = re.compile(r"No space left on device|Disk quota exceeded")
PATIENCE_SECONDS = 2.0  # of waiting for a lock in silence

#: What is wrong with a disk or a place on it and never with the program, wherever it comes up. "No such file" and
#: "invalid argument" are not among them: from a line that reads, they are our faults (see `making`).
DISK_ERRORS = {
    errno.ENOSPC: "the disk is full; free some space and start again",
    errno.EDQUOT: "your disk quota is used up; free some space and start again",
    errno.EROFS: "the file system is read-only; choose another place",
    errno.EACCES: "permission denied; choose another place or change its permissions",
    errno.EPERM: "nothing can be written there; choose another place",
    errno.EEXIST: "there is a file where a folder is needed; choose another place",
    errno.ENOTDIR: "there is a file where a folder is needed; choose another place",
    errno.EISDIR: "there is a folder where a file is needed; choose another place",
    errno.ENAMETOOLONG: "the name is too long for the file system; choose a shorter one",
    errno.ELOOP: "links lead in a circle; mend them, or choose another place",
    errno.EIO: "the disk or its connection fails; look at the system's messages, or choose another place",
    errno.ESTALE: "the connection to a network disk is lost; mount it again, or choose another place",
}


def ultravox_home() -> Path:
    """The folder for models, data and caches: ``$ULTRAVOX_HOME``, by default ``~/.cache/ultravox``."""
    return Path(os.environ.get("ULTRAVOX_HOME") or Path.home() / ".cache" / "ultravox").expanduser()


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's content, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def explain_full_disk(path: str | Path) -> Iterator[None]:
    """Turn "no space left on device" into an error that names the place and what to do."""
    try:
        yield
    except Exception as error:
        no_room = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if no_room or _NO_ROOM.search(str(error)):  # safetensors has an error of its own for it
            message = f"disk full while writing {path}: free some space or choose another place; nothing was left there"
            raise UltravoxError(message) from error
        raise


@contextmanager
def making(path: str | Path) -> Iterator[None]:
    """Around the lines that make an output's folder or file, and nothing else: whatever the system says there is about
    the place. `DISK_ERRORS` pass, since they are explained wherever they come up; the others become one line here.
    """
    try:
        yield
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise
        raise UltravoxError(f"{path}: nothing can be made there ({error.strerror}); choose another place") from error
    except ValueError as error:  # a null byte
        raise UltravoxError(f"{str(path)!r} cannot be the name of a file ({error}); choose another") from error


def make_folder(path: str | Path) -> Path:
    """A folder of an output, with its parents, where it is not there yet. UltravoxError when it cannot be made."""
    with making(path):
        Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


def require_place(path: str | Path) -> None:
    """Refuse a place where no file can be made, before the work whose result is to go there; leaves nothing behind."""
    path = Path(path)
    with making(path):
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        make_folder(path)
        with making(path), tempfile.TemporaryFile(dir=path):
            pass
    finally:
        for made in missing:  # the deepest first
            with suppress(OSError, ValueError):
                made.rmdir()


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file, which the kernel frees with its process; waits for who has it.

    Whoever has waited for `PATIENCE_SECONDS` says once, on standard error, for which process and what it does: `what`.
    """
    with making(path):
        file = path.open("a+")  # not "w": the name of the process that has it must stay
    with file:
        teller = threading.Timer(PATIENCE_SECONDS, _say_who_is_waited_for, (path, what))
        teller.daemon = True
        teller.start()
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        finally:
            teller.cancel()
        with suppress(OSError):  # a full disk must not keep anyone from making room on it
            file.truncate(0)
            file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
            file.flush()
        try:
            yield
        finally:
            with suppress(OSError):
                file.truncate(0)


def _say_who_is_waited_for(path: Path, what: str) -> None:
    who = ""
    with suppress(OSError):
        who = path.read_text(encoding="utf-8", errors="replace").strip()
    print(f"waiting for {who or 'another process'}, which {what}", file=sys.stderr, flush=True)


def fsync_file(path: Path) -> None:
    """Wait until a file's, or a folder's, content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write a file so that a reader sees the old content or the new, never half of it."""
    path = Path(path)
    make_folder(path.parent)
    with explain_full_disk(path):
        with making(path):
            descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    fsync_file(path.parent)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Fill a folder under a temporary name; it takes its own name when the block ends well, and vanishes when not.

    An older folder of that name is replaced. Yields the temporary folder.
    """
    path = Path(path)
    make_folder(path.parent)
    with explain_full_disk(path):
        with making(path):
            temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            yield temporary
            for file in temporary.rglob("*"):
                fsync_file(file)
            fsync_file(temporary)
            replace_folder(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def replace_folder(temporary: Path, path: Path) -> None:
    """Give a finished folder its own name; an older folder of that name is removed."""
    temporary.chmod(0o755)
    if path.exists():
        old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
        os.replace(path, old / "old")
        os.replace(temporary, path)
        shutil.rmtree(old)
    else:
        os.replace(temporary, path)
    fsync_file(path.parent)
