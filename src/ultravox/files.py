"""Files that are whole or absent: atomic writes, content hashes, and the one folder that everything is cached under."""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ultravox.errors import UltravoxError


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
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"disk full while writing {path}: free some space or choose another place; nothing was left there"
            raise UltravoxError(message) from error
        raise


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
    path.parent.mkdir(parents=True, exist_ok=True)
    with explain_full_disk(path):
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
    path.parent.mkdir(parents=True, exist_ok=True)
    with explain_full_disk(path):
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    fsync_file(file)
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
