"""ClearML (extra ``clearml``)."""

import os
import signal
import ssl
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

from ultravox.auth.credentials import Found, in_environment
from ultravox.errors import UltravoxError
from ultravox.training.task import Transcript
from ultravox.training.trackers.tracker import Outcome, Tracker, require_key, table, wave_files

ANSWER_SECONDS = 10.0
#: What ClearML would hook into by itself. A run tells it what it is to know, and nothing else.
FRAMEWORKS = (
    "catboost detect_repository fastai gradio hydra joblib jsonargparse lightgbm matplotlib megengine pytorch scikit "
    "tensorboard tensorflow tfdefines xgboost"
).split()


class ClearmlTracker(Tracker):
    """A task of ClearML: a plot per number, a line per stage."""

    name = "clearml"
    modules = ("clearml",)
    service = "clearml"

    @classmethod
    def require_ready(cls, offline: bool, found: Mapping[str, Found]) -> None:
        """Credentials, or the file that `clearml-init` writes."""
        written = Path(os.environ.get("CLEARML_CONFIG_FILE", "~/clearml.conf")).expanduser()
        if not offline and not written.is_file():
            variables = ("CLEARML_API_HOST", "CLEARML_API_ACCESS_KEY", "CLEARML_API_SECRET_KEY")
            require_key("clearml", "ClearML", found, *variables)

    def start(self, run_id: str | None, config: dict[str, Any]) -> str:
        """See `Tracker`. ClearML cannot go on with an offline session: a new one begins, which names that one."""
        options = self.options
        if options.offline:
            options.folder.mkdir(parents=True, exist_ok=True)
            kept = {"CLEARML_CACHE_DIR": options.folder, "CLEARML_CONFIG_FILE": options.folder / "none.conf"}
            self.stack.enter_context(in_environment({name: str(path.resolve()) for name, path in kept.items()}))
        from clearml import Task
        from clearml.backend_api import Session

        if Task.is_offline() != options.offline:  # of the whole process, so that an earlier run may have set it
            Task.set_offline(options.offline)
        if not options.offline:
            require_answer(Session.get_api_server_host())
        Task.set_random_seed(None)  # else it seeds what the run has seeded
        continued = run_id is not None and not options.offline
        with _signals_kept():
            self._task = Task.init(
                project_name=options.project,
                task_name=options.run_name,
                reuse_last_task_id=run_id if continued else False,
                continue_last_task=0 if continued else False,  # 0: our steps go on by themselves
                auto_connect_arg_parser=False,
                auto_connect_frameworks=dict.fromkeys(FRAMEWORKS, False),
                auto_connect_streams=False,
                auto_resource_monitoring=False,
            )
        self._task.set_configuration_object("run", config_dict=config)
        if run_id is not None and not continued:
            self._task.set_comment(f"goes on with {run_id}")
        return str(self._task.id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        logger = self._task.get_logger()
        for name, value in values.items():
            stage, _, title = name.rpartition("/")
            logger.report_scalar(title, stage, value, step)

    def log_transcripts(self, stage: str, transcripts: Sequence[Transcript], step: int) -> None:
        """See `Tracker`."""
        texts = table(transcripts)
        rows = [list(texts), *map(list, zip(*texts.values(), strict=True))]
        logger = self._task.get_logger()
        logger.report_table("transcripts", stage, step, table_plot=rows)
        with wave_files(transcripts) as files:
            for transcript, path in files:
                # a stream, since the file is gone before ClearML's own thread reads it
                stream = BytesIO(path.read_bytes())
                logger.report_media(f"audio {stage}", transcript.id, step, stream=stream, file_extension="wav")

    def log_checkpoint(self, folder: Path, step: int) -> None:
        """See `Tracker`."""
        self._task.upload_artifact(folder.name, str(folder), metadata={"step": step}, wait_on_upload=True)

    def finish(self, outcome: Outcome) -> None:
        """See `Tracker`."""
        if not self.options.offline and outcome == "failed":
            self._task.mark_failed(status_reason="the run ended with an error")
        elif not self.options.offline and outcome == "stopped":
            self._task.mark_stopped()
        self._task.close()


def require_answer(server: str) -> None:
    """UltravoxError when nobody is there: ClearML itself would try again for hours before it said so."""
    try:
        with urlopen(f"{server.rstrip('/')}/debug.ping", timeout=ANSWER_SECONDS):
            pass
    except HTTPError:
        return  # an answer
    except (OSError, HTTPException, ValueError) as error:
        if isinstance(getattr(error, "reason", None), ssl.SSLError):
            return  # whose certificate ClearML may be told to take
        raise UltravoxError(f"the server {server} does not answer ({error})") from error


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Put back the signal handlers that ClearML replaces: Ctrl-C saves a checkpoint."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
