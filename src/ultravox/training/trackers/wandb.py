"""Weights & Biases (extra ``wandb``)."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ultravox.auth.credentials import Found, in_environment
from ultravox.training.task import Transcript
from ultravox.training.trackers.tracker import Outcome, Tracker, caption, require_key, table, wave_files


class WandbTracker(Tracker):
    """A run of W&B. Its x-axis is the value `step`, so that a resumed run may log a step once more."""

    name = "wandb"
    modules = ("wandb",)
    service = "wandb"

    @classmethod
    def require_ready(cls, offline: bool, found: Mapping[str, Found]) -> None:
        """A key, but for W&B's own ways of doing without."""
        switched_off = os.environ.get("WANDB_MODE") in ("offline", "disabled")
        if not offline and not switched_off and "WANDB_IDENTITY_TOKEN_FILE" not in os.environ:
            require_key("wandb", "Weights & Biases", found, "WANDB_API_KEY")

    def start(self, run_id: str | None, config: dict[str, Any]) -> str:
        """See `Tracker`. Offline, a run that goes on is a further folder of the same run; `wandb sync` joins them."""
        import wandb

        options = self.options
        folder = options.folder.resolve()  # W&B keeps paths in its files
        folder.mkdir(parents=True, exist_ok=True)
        # checkpoints wait there until they are sent
        self.stack.enter_context(in_environment({"WANDB_DATA_DIR": str(folder)}))
        self._run = wandb.init(
            project=options.project,
            name=options.run_name,
            dir=str(folder),
            config=config,
            id=run_id,
            resume="allow" if run_id and not options.offline else None,
            mode="offline" if options.offline else None,  # None: WANDB_MODE, else online
            settings=wandb.Settings(
                console="off",  # the terminal's text stays there
                silent=True,
                disable_code=True,  # neither code nor a diff of it is sent
                disable_git=True,
                disable_job_creation=True,
            ),
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        return str(self._run.id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        self._run.log({**values, "step": step})

    def log_transcripts(self, stage: str, transcripts: Sequence[Transcript], step: int) -> None:
        """See `Tracker`."""
        import wandb

        texts = table(transcripts)
        rows = [list(row) for row in zip(*texts.values(), strict=True)]
        with wave_files(transcripts) as files:
            players = [wandb.Audio(str(path), caption=caption(transcript)) for transcript, path in files]
            shown = {f"{stage}/audio": players} if players else {}
            self._run.log({**shown, f"{stage}/transcripts": wandb.Table(list(texts), rows), "step": step})

    def log_checkpoint(self, folder: Path, step: int) -> None:
        """See `Tracker`. The artifact's versions are the checkpoints."""
        import wandb

        artifact = wandb.Artifact(f"checkpoint-{self._run.id}", type="checkpoint", metadata={"step": step})
        artifact.add_dir(str(folder))
        self._run.log_artifact(artifact, aliases=[folder.name])

    def finish(self, outcome: Outcome) -> None:
        """See `Tracker`."""
        self._run.finish(exit_code=0 if outcome == "finished" else 1)
