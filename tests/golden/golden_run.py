"""The run behind the golden loss curve. `python tests/golden/golden_run.py` writes the committed list anew."""

import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from tiny_run import save_tiny_models, save_tones, tiny_config

CURVE = Path(__file__).parent / "loss_curve.json"


def golden_losses(models: tuple[Path, Path], tones: Path, run_dir: Path, **changes) -> list[float]:
    """Losses of a run's 100 steps, 60 of alignment and 40 of tuning, on one thread."""
    from ultravox.training.run import run_training

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run_training(tiny_config(models, tones, run_dir, **changes))
    finally:
        torch.set_num_threads(threads)
    rows = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


if __name__ == "__main__":
    import os

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["ULTRAVOX_HOME"] = str(folder / "home")
        losses = golden_losses(save_tiny_models(folder), save_tones(folder / "tones"), folder / "run")
        target = Path(sys.argv[1]) if len(sys.argv) > 1 else CURVE
        target.write_text(json.dumps({"version": 1, "torch": torch.__version__, "losses": losses}, indent=0) + "\n")
