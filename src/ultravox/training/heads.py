"""What an objective has learnt beside the model, in `heads/<stage>/` of the run's folder."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ultravox.errors import CheckpointError
from ultravox.files import atomic_folder
from ultravox.objectives.end_of_audio import StopHead
from ultravox.training.speech_task import SpeechTask

FOLDER = "heads"


def save_head(run_dir: Path, stage: str, task: SpeechTask) -> None:
    """Write the parameters and buffers of a stage's objective, where they are of use after training."""
    if not task.keeps_extra or task.extra is None:
        return
    from safetensors.torch import save_file

    state: dict[str, Tensor] = {name: value.detach().contiguous() for name, value in task.extra.state_dict().items()}
    about = {"tune": json.dumps(task.stage.tune.model_dump(mode="json"))}
    with atomic_folder(run_dir / FOLDER / stage) as folder:
        save_file(state, folder / "head.safetensors", metadata=about)


def load_stop_head(run_dir: str | Path, stage: str) -> StopHead:
    """The classifier that `tune.end_of_audio.variant: head` has trained in a stage.

    It takes the decoder's states at audio positions, [position, hidden]: see `StopHead.forward`.

    Raises:
        CheckpointError: there is none.
    """
    from safetensors.torch import load_file

    path = Path(run_dir) / FOLDER / stage / "head.safetensors"
    state: dict[str, Any] = load_file(path) if path.is_file() else {}
    mine = {name.removeprefix("end_of_audio."): value for name, value in state.items() if "end_of_audio." in name}
    if not mine:
        raise CheckpointError(f"{path} holds no stop head: train a stage with tune.end_of_audio.variant: head")
    head = StopHead(mine["linear.weight"].shape[1], float(mine["positive_weight"]))
    head.load_state_dict(mine)
    return head.eval()
