"""Hashes of a saved model's files, so that a damaged one is refused by name instead of answering nonsense."""

import json
from pathlib import Path

from ultravox.errors import CheckpointError
from ultravox.files import atomic_write, sha256_file

MANIFEST_FILE = "ultravox_manifest.json"
MANIFEST_VERSION = 1


def write_manifest(folder: Path, names: list[str] | None = None) -> None:
    """Hash the folder's files; with `names`, only those anew, where there is a manifest already."""
    files = {} if names is None else _read(folder)
    if names is None or files:
        paths = sorted(folder.iterdir()) if names is None else [folder / name for name in names]
        for path in paths:
            if path.is_file() and path.name != MANIFEST_FILE and not path.name.startswith("."):
                files[path.name] = sha256_file(path)
        content = {"version": MANIFEST_VERSION, "sha256": files}
        atomic_write(folder / MANIFEST_FILE, json.dumps(content, indent=2) + "\n")


def verify_manifest(folder: Path) -> None:
    """Compare the files with their hashes; a folder without a manifest comes from elsewhere and passes.

    Raises:
        CheckpointError: naming the first file that is missing or different.
    """
    for name, expected in _read(folder).items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: copy the whole checkpoint again")
        if sha256_file(path) != expected:
            raise CheckpointError(
                f"{path} is damaged: its SHA-256 differs from the one in {MANIFEST_FILE}; copy the checkpoint again, "
                f"or delete {MANIFEST_FILE} if you changed the file yourself"
            )


def _read(folder: Path) -> dict[str, str]:
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files = content["sha256"]
        known = content["version"] == MANIFEST_VERSION and all(Path(name).name == name for name in files)
    except (ValueError, KeyError, TypeError, AttributeError):
        known = False
    if not known:
        raise CheckpointError(f"{path} is damaged or of a newer version: copy the checkpoint again")
    return files
