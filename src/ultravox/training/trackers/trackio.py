"""trackio (extra ``trackio``): local by default, or a Hugging Face Space or a server of one's own."""

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from ultravox.auth.credentials import Found, in_environment
from ultravox.errors import ConfigError, UltravoxError
from ultravox.training.task import Transcript
from ultravox.training.trackers.tracker import Outcome, Tracker, caption, require_key, table, wave_files

#: Where trackio sends to, in the environment.
REMOTE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_BUCKET_ID")


class TrackioTracker(Tracker):
    """A run of trackio."""

    name = "trackio"
    modules = ("trackio", "pandas")
    service = "huggingface"

    @classmethod
    def require_ready(cls, offline: bool, found: Mapping[str, Found]) -> None:
        """A token where it sends to a Space."""
        if offline:
            return
        if os.environ.get("TRACKIO_SPACE_ID"):
            require_key("trackio", "Hugging Face", found, "HF_TOKEN")
            return
        url = os.environ.get("TRACKIO_SERVER_URL", "")
        if url and "write_token=" not in url and not os.environ.get("TRACKIO_WRITE_TOKEN"):
            raise ConfigError(
                "TRACKIO_SERVER_URL is set, but TRACKIO_WRITE_TOKEN is not: set it too, or log offline with "
                "--logging.offline true"
            )

    def start(self, run_id: str | None, config: dict[str, Any]) -> str:
        """See `Tracker`. trackio goes on with runs by their name: the id says whether it is the same one."""
        options = self.options
        if options.offline:
            folder = options.folder.resolve()
            self.stack.enter_context(in_environment({"TRACKIO_DIR": str(folder), **dict.fromkeys(REMOTE)}))
        import trackio
        import trackio.utils

        if options.offline and Path(trackio.utils.TRACKIO_DIR) != folder:
            raise UltravoxError(
                f"trackio already writes to {trackio.utils.TRACKIO_DIR} in this process, and keeps one folder: train "
                "in a process of its own"
            )
        with redirect_stdout(sys.stderr):  # what it tells is no output of ours
            self._run = trackio.init(
                project=options.project,
                name=options.run_name,
                config=config,
                resume="must" if run_id else "never",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        if run_id is not None and self._run.id != run_id:
            raise UltravoxError(
                f"trackio's newest run named {options.run_name!r} in {options.project!r} is another one: set "
                "logging.run_name to a name of its own"
            )
        return str(self._run.id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        self._run.log(dict(values), step=step)

    def log_transcripts(self, stage: str, transcripts: Sequence[Transcript], step: int) -> None:
        """See `Tracker`."""
        import pandas
        import trackio

        with wave_files(transcripts) as files:
            shown: dict[str, Any] = {
                f"{stage}/audio/{index}": trackio.Audio(str(path), caption=caption(transcript))
                for index, (transcript, path) in enumerate(files)
            }
            shown[f"{stage}/transcripts"] = trackio.Table(dataframe=pandas.DataFrame(table(transcripts)))
            self._run.log(shown, step=step)

    def log_checkpoint(self, folder: Path, step: int) -> None:
        """See `Tracker`. The artifact's versions are the checkpoints."""
        name = f"checkpoint-{self._run.id}"
        self._run.log_artifact(str(folder), name=name, type="checkpoint", aliases=[folder.name])

    def finish(self, outcome: Outcome) -> None:
        """See `Tracker`."""
        with redirect_stdout(sys.stderr):
            self._run.finish()
