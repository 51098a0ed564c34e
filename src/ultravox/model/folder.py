"""Where the model of a CHECKPOINT argument lies; light, so that a wrong path is told before anything is loaded."""

from pathlib import Path

from ultravox.errors import CheckpointError


def find_model_folder(checkpoint: str | Path) -> Path:
    """The model folder of a CHECKPOINT argument: a run folder, its ``model/``, or any saved model.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(checkpoint).expanduser()
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint {path}: expected a run folder, its model/ or a saved model folder")
    for folder in (path / "model", path):
        if (folder / "config.json").is_file():
            return folder
    hint = "its training has not finished" if (path / "config.yaml").is_file() else "expected config.json"
    hint += "; go on with --resume" if any(path.glob("checkpoints/[!.]*")) else ""
    raise CheckpointError(f"{path} holds no saved model: {hint}")
