"""MLflow (extra ``mlflow``): a server, or a database file."""

import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ultravox.auth.credentials import Found, in_environment
from ultravox.errors import ConfigError
from ultravox.training.task import Transcript
from ultravox.training.trackers.tracker import Outcome, Tracker, table, wave_files

URI_VARIABLE = "MLFLOW_TRACKING_URI"
#: MLflow takes no longer ones, and no more at once.
MAX_VALUE, MAX_BATCH = 6000, 100
NOT_IN_A_NAME = re.compile(r"[^\w. /:-]")
#: What of MLflow's own waiting is changed while a run logs: 7 retries of 120 s each would hold training up.
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
QUIET = {"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


class MlflowTracker(Tracker):
    """A run of MLflow, by its client alone: nothing of it is global."""

    name = "mlflow"
    modules = ("mlflow",)

    @classmethod
    def require_ready(cls, offline: bool, found: Mapping[str, Found]) -> None:
        """A tracking URI that MLflow takes."""
        uri = os.environ.get(URI_VARIABLE, "")
        if offline:
            return
        if not uri:
            raise ConfigError(
                f"logging.trackers names mlflow, but {URI_VARIABLE} is not set: set it to your server "
                "(https://…) or a database (sqlite:///mlflow.db), or log offline with --logging.offline true"
            )
        scheme = urlsplit(uri).scheme
        if scheme in ("", "file"):
            raise ConfigError(
                f"{URI_VARIABLE} is a folder, which MLflow no longer logs to: set it to a database "
                "(sqlite:///mlflow.db) or your server (https://…), or log offline with --logging.offline true"
            )

    def start(self, run_id: str | None, config: dict[str, Any]) -> str:
        """See `Tracker`. Offline: `mlflow.db` and `artifacts/` in the tracker's folder."""
        options = self.options
        kept = {variable: os.environ.get(variable, value) for variable, value in (PATIENCE | QUIET).items()}
        self.stack.enter_context(in_environment(kept))
        from mlflow import MlflowClient
        from mlflow.entities import Param

        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # it tells of each table that it makes
        uri, place = os.environ.get(URI_VARIABLE), None
        if options.offline:
            options.folder.mkdir(parents=True, exist_ok=True)
            uri = f"sqlite:///{(options.folder / 'mlflow.db').resolve()}"
            place = (options.folder / "artifacts").resolve().as_uri()
        self._client = MlflowClient(tracking_uri=uri)
        if run_id is not None:
            self._client.update_run(run_id, status="RUNNING")
            self._run_id = run_id
        else:
            experiment = self._client.get_experiment_by_name(options.project)
            number = experiment.experiment_id if experiment else self._client.create_experiment(options.project, place)
            self._run_id = self._client.create_run(number, run_name=options.run_name).info.run_id
            params = [Param(key, str(value)[:MAX_VALUE]) for key, value in flat(config).items()]
            for start in range(0, len(params), MAX_BATCH):
                self._client.log_batch(self._run_id, params=params[start : start + MAX_BATCH])
        self._client.log_dict(self._run_id, config, "config.json")
        return str(self._run_id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        from mlflow.entities import Metric

        now = round(1000 * time.time())
        self._client.log_batch(self._run_id, [Metric(name, value, now, step) for name, value in values.items()])

    def log_transcripts(self, stage: str, transcripts: Sequence[Transcript], step: int) -> None:
        """See `Tracker`. One table a stage, to which each evaluation adds its rows."""
        rows = {"step": [step] * len(transcripts), **table(transcripts)}
        self._client.log_table(self._run_id, rows, f"transcripts/{stage}.json")
        with wave_files(transcripts) as files:
            for _, path in files:
                self._client.log_artifact(self._run_id, str(path), f"audio/{stage}/{step:08d}")

    def log_checkpoint(self, folder: Path, step: int) -> None:
        """See `Tracker`."""
        self._client.log_artifacts(self._run_id, str(folder), f"checkpoints/{folder.name}")

    def finish(self, outcome: Outcome) -> None:
        """See `Tracker`."""
        status = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[outcome]
        self._client.set_terminated(self._run_id, status)


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys → values; a list of sections by their numbers."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        path = prefix + NOT_IN_A_NAME.sub("_", str(key))
        if isinstance(value, Mapping):
            found |= flat(value, f"{path}.")
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            for number, item in enumerate(value):
                found |= flat(item, f"{path}.{number}.")
        else:
            found[path] = value
    return found
