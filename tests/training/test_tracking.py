"""What is common to all trackers: failures, resumption, refusals before anything is loaded. Most here are fakes."""

import io
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import yaml
from rich.console import Console
from tracked_run import logged, require_trackers, short_config

from ultravox.auth.credentials import CREDENTIALS, Found
from ultravox.auth.secret import Secret
from ultravox.cli.main import main
from ultravox.config.schema import RunConfig
from ultravox.errors import CheckpointError, ConfigError, UltravoxError
from ultravox.training.interrupt import TrainingInterrupted
from ultravox.training.preflight import preflight
from ultravox.training.run import run_training
from ultravox.training.task import Transcript
from ultravox.training.trackers import tracking as tracking_module
from ultravox.training.trackers.clearml import require_answer
from ultravox.training.trackers.mlflow import MlflowTracker, flat
from ultravox.training.trackers.registry import TRACKERS, make_tracking
from ultravox.training.trackers.tracker import Tracker, TrackerOptions, wave_files
from ultravox.training.trackers.tracking import RunTracking, StageTracking
from ultravox.training.trainer import StepRecord

TOKEN = "hf_canaryCanaryCanaryCanaryCanary0123"


class FakeTracker(Tracker):
    """Keeps what it is told."""

    name = "mlflow"
    modules = ("json",)
    made: ClassVar[list["FakeTracker"]] = []

    def __init__(self, options):
        super().__init__(options)
        self.calls, self.fails = [], set()
        FakeTracker.made.append(self)

    @classmethod
    def require_ready(cls, offline, found):
        pass

    def _take(self, what, *values):
        self.calls.append((what, *values))
        if what in self.fails:
            raise ConnectionError(f"no answer\nto {TOKEN}")

    def start(self, run_id, config):
        self._take("start", run_id, config)
        return run_id or f"id-{len(FakeTracker.made)}"

    def log(self, values, step):
        self._take("log", dict(values), step)

    def log_transcripts(self, stage, transcripts, step):
        self._take("transcripts", stage, [t.id for t in transcripts], step)

    def log_checkpoint(self, folder, step):
        self._take("checkpoint", folder.name, step)

    def finish(self, outcome):
        self._take("finish", outcome)


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """No credentials, no settings of trackers, no earlier fakes."""
    FakeTracker.made = []
    home = tmp_path / "user"
    home.mkdir()
    for name in (*(c.variable for c in CREDENTIALS), "HF_HOME", "HF_TOKEN_PATH", "XDG_CACHE_HOME", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "MLFLOW_TRACKING_URI", "CLEARML_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_WRITE_TOKEN", "AZURE_KEY_VAULT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setitem(TRACKERS, "mlflow", FakeTracker)
    return FakeTracker


def options(tmp_path, **changes):
    return TrackerOptions("project", "name", tmp_path / "mlflow", **{"offline": True, **changes})


def record(step, **changes):
    values = {"stage": "tune", "step": step, "max_steps": 10, "loss": float(step), "lr": {"projector": 1e-3}}
    more = {"grad_norm": 0.5, "audio_seconds": 20.0, "num_tokens": 300, "elapsed_seconds": 2.0 * step}
    return StepRecord(**{**values, **more, **changes})


# What they are told


def test_rows_are_means_on_one_axis_over_the_stages(tmp_path):
    tracker = FakeTracker(options(tmp_path))
    with RunTracking([tracker], tmp_path, {"seed": 1}) as tracking:
        stage = StageTracking(tracking.started, log_every=4, first_step=100, num_transcripts=2)
        for step in range(1, 11):
            stage.on_step(record(step, grad_norm=math.nan if step == 8 else 0.5))
        stage.on_evaluation("tune", 10, {"wer": 0.25, "cer": math.inf})
        transcripts = [Transcript(name, "a", "b", lambda: None) for name in "xyz"]
        stage.on_transcripts("tune", 10, transcripts)
        stage.on_checkpoint(10, tmp_path / "tune-000010")
    assert tracker.calls[0] == ("start", None, {"seed": 1})
    rows = [(values, step) for what, values, step in (call for call in tracker.calls if call[0] == "log")]
    assert [step for _, step in rows] == [104, 108, 110, 110]
    assert [row["tune/loss"] for row, _ in rows[:3]] == [2.5, 6.5, 9.5]
    assert rows[0][0]["tune/audio_seconds_per_second"] == pytest.approx(10)
    assert (rows[0][0]["tune/lr_projector"], rows[0][0]["tune/grad_norm"]) == (1e-3, 0.5)
    assert "tune/grad_norm" not in rows[1][0], "what is not finite is left out"
    assert rows[3][0] == {"tune/wer": 0.25}
    assert tracker.calls[-3:] == [
        ("transcripts", "tune", ["x", "y"], 110),
        ("checkpoint", "tune-000010", 110),
        ("finish", "finished"),
    ]


def test_recordings_become_files_for_as_long_as_they_are_needed():
    tone = (0.3 * np.sin(np.arange(3200) / 5)).astype(np.float32)
    transcripts = [Transcript("a/b c", "", "", lambda: tone), Transcript("text", "", "", lambda: None)]
    with wave_files(transcripts) as files:
        [(transcript, path)] = files
        assert (transcript.id, path.name) == ("a/b c", "00-a_b_c.wav")
        assert path.stat().st_size == 44 + 2 * 3200
    assert not path.exists()


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(TrainingInterrupted(2), "stopped"), (KeyboardInterrupt(), "stopped"), (UltravoxError("x"), "failed")],
)
def test_how_a_run_ends(tmp_path, error, outcome):
    tracker = FakeTracker(options(tmp_path))
    with pytest.raises(type(error)), RunTracking([tracker], tmp_path, {}):
        raise error
    assert tracker.calls[-1] == ("finish", outcome)


# Failures


def test_a_failure_in_the_run_is_told_once_and_counted(tmp_path, monkeypatch):
    output = io.StringIO()
    now = SimpleNamespace(monotonic=lambda: now.time, time=0.0)
    monkeypatch.setattr(tracking_module, "time", now)
    bad, good = FakeTracker(options(tmp_path)), FakeTracker(options(tmp_path))
    good.name = "wandb"
    console = Console(file=output, width=80)
    with RunTracking([bad, good], tmp_path, {}, secrets=[Secret(TOKEN)], console=console) as tracking:
        stage = StageTracking(tracking.started, log_every=1)
        bad.fails = {"log", "finish"}
        stage.on_step(record(1))
        now.time = tracking_module.PAUSE_SECONDS - 1
        stage.on_step(record(2))  # left alone
        now.time += 2
        stage.on_step(record(3))  # tried again
        bad.fails = {"finish"}
        now.time += tracking_module.PAUSE_SECONDS
        stage.on_step(record(4))  # it is back
    assert [call[2] for call in bad.calls if call[0] == "log"] == [1, 3, 4]
    assert [call[2] for call in good.calls if call[0] == "log"] == [1, 2, 3, 4]
    assert good.calls[-1] == ("finish", "finished")
    assert output.getvalue().splitlines() == [
        "mlflow: ConnectionError: no answer to [redacted]; training goes on, and log.jsonl has all numbers",
        "mlflow: could not finish: ConnectionError: no answer to [redacted]",
        "mlflow: 3 of the messages to it were lost",
    ]


def test_a_failure_in_a_real_run_changes_no_number(parts, tmp_path, fake, monkeypatch, capsys):
    plain = run_training(short_config(parts, tmp_path / "plain"))

    class Broken(FakeTracker):
        def _take(self, what, *values):
            super()._take(what, *values)
            if what != "start":
                raise ConnectionError("gone")

    monkeypatch.setitem(TRACKERS, "mlflow", Broken)
    config = short_config(parts, tmp_path / "run", trackers=["mlflow"], offline=True, upload_checkpoints=True)
    capsys.readouterr()
    assert logged(run_training(config)) == logged(plain)
    text = capsys.readouterr().err
    assert text.count("mlflow: ConnectionError: gone; training goes on") == 1
    assert "of the messages to it were lost" in text


def test_a_failure_at_the_start_ends_the_run(parts, tmp_path, fake, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    inner = fake.start

    def start(self, run_id, config):
        self.fails = {"start"}
        return inner(self, run_id, config)

    monkeypatch.setattr(fake, "start", start)
    config = short_config(parts, tmp_path / "run", trackers=["mlflow"], offline=True)
    message = r"mlflow could not start: ConnectionError: no answer to \[redacted\]; .*offline"
    with pytest.raises(UltravoxError, match=message):
        run_training(config)
    assert logged_or_none(tmp_path / "run") is None


def logged_or_none(run_dir):
    return logged(run_dir) if (run_dir / "log.jsonl").is_file() else None


def test_the_others_are_finished_when_one_cannot_start(tmp_path):
    first, second = FakeTracker(options(tmp_path)), FakeTracker(options(tmp_path))
    first.name, second.fails = "wandb", {"start"}
    undone = []
    second.stack.callback(undone.append, True)
    with pytest.raises(UltravoxError, match="mlflow could not start"), RunTracking([first, second], tmp_path, {}):
        pytest.fail("it must not begin")
    assert first.calls[-1] == ("finish", "failed")
    assert second.calls == [("start", None, {})]
    assert undone == [True]


# Going on


def start_again(tmp_path, resume=True, **changes):
    tracker = FakeTracker(options(tmp_path, **changes))
    with RunTracking([tracker], tmp_path, {}, resume=resume):
        pass
    return tracker.calls[0][1]


def test_a_resumed_run_goes_on_with_its_id(tmp_path):
    assert start_again(tmp_path, resume=False) is None
    assert start_again(tmp_path) == "id-1"
    content = json.loads((tmp_path / "trackers.json").read_text())
    run = {"project": "project", "offline": True, "ids": ["id-1"]}
    assert content == {"version": 1, "runs": {"mlflow": run}}
    assert start_again(tmp_path, offline=False) is None, "another place does not know the run"
    assert start_again(tmp_path, resume=False) is None


def test_a_run_that_cannot_be_gone_on_with_is_told(tmp_path, capsys):
    start_again(tmp_path, resume=False)
    tracker = FakeTracker(options(tmp_path))
    tracker.start = lambda run_id, config: "another"
    with RunTracking([tracker], tmp_path, {}, resume=True):
        pass
    assert capsys.readouterr().err == "mlflow: run id-1 cannot be gone on with; a new one began, another\n"
    assert start_again(tmp_path) == "another"


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"runs": {}}', '{"version": 1, "runs": {"mlflow": {"ids": []}}}', '{"version": 1, "runs": {"a": 1}}'],
)
def test_a_file_of_ids_that_is_damaged(tmp_path, text):
    (tmp_path / "trackers.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"trackers\.json .*remove it to begin new runs"):
        start_again(tmp_path)


def test_a_newer_file_of_ids_is_refused(tmp_path):
    (tmp_path / "trackers.json").write_text('{"version": 2, "runs": {}}')
    with pytest.raises(CheckpointError, match="format version 2, this UltraVox reads 1"):
        start_again(tmp_path)


def test_overwriting_a_run_forgets_its_trackers(parts, tmp_path, fake):
    config = short_config(parts, tmp_path / "run", trackers=["mlflow"], offline=True)
    run_training(config)
    (tmp_path / "run" / "trackers").mkdir()
    run_training(config, resume=True)  # finished: nobody is told
    assert [call[0] for call in fake.made[0].calls][:1] == ["start"]
    assert len(fake.made) == 1
    run_training(config, overwrite=True)
    assert not (tmp_path / "run" / "trackers").exists()
    assert fake.made[1].calls[0][1] is None
    steps = [call[2] for call in fake.made[1].calls if call[0] == "log" and len(call[1]) > 8 and "tune/loss" in call[1]]
    assert steps == list(range(5, 11))


def test_only_the_main_process_has_trackers(parts, tmp_path, fake):
    config = short_config(parts, tmp_path / "run", trackers=["mlflow"], offline=True)
    with make_tracking(config, {}, has_trackers=False) as tracking:
        assert tracking.started == []
    assert fake.made == []


def test_no_secret_in_the_configuration_that_trackers_get(parts, tmp_path, fake):
    """A configuration holds none; whoever writes one into a name or path is protected all the same."""
    config = short_config(parts, tmp_path / "run", trackers=["mlflow"], offline=True, run_name="name")
    config.evaluation.source = f"user:{TOKEN}@example.com/data"
    with make_tracking(config, {"HF_TOKEN": Found(Secret(TOKEN), ".env")}):
        pass
    seen = fake.made[0].calls[0][2]
    assert seen["evaluation"]["source"] == "user:[redacted]@example.com/data"
    assert fake.made[0].options == TrackerOptions("ultravox", "name", tmp_path / "run" / "trackers" / "mlflow", True)


# Before anything is loaded


def settings(**logging):
    content = {"stages": [{"name": "tune", "objective": "tune", "max_steps": 1}], "logging": logging}
    return RunConfig.model_validate(content)


@pytest.mark.parametrize("name", ["wandb", "mlflow", "clearml", "trackio"])
def test_a_package_that_is_missing(name, monkeypatch):
    monkeypatch.setattr(TRACKERS[name], "modules", ("json", "no_such_package"))
    with pytest.raises(ConfigError, match=rf"{name}, which is not installed: pip install 'ultravox\[{name}\]'"):
        preflight(settings(trackers=[name], offline=True))


def test_a_missing_package_ends_the_command_with_2(tmp_path, monkeypatch, capsys):
    """Before the model, which does not exist here, is looked for."""
    monkeypatch.setattr(TRACKERS["wandb"], "modules", ("no_such_package",))
    config = {"model": {"language_model": "no/such/model"}, "logging": {"trackers": ["wandb"]}}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**config, "stages": [{"name": "tune", "objective": "tune", "max_steps": 1}]}))
    assert main(["train", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ultravox: error: logging.trackers names wandb, which is not installed")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "environment", "message"),
    [
        ("wandb", {}, r"WANDB_API_KEY is not set: .*\.env.*logging\.offline true"),
        ("wandb", {"WANDB_API_KEY": TOKEN}, r"WANDB_API_KEY \(from environment\) does not look like one"),
        ("clearml", {}, "CLEARML_API_HOST and CLEARML_API_ACCESS_KEY and CLEARML_API_SECRET_KEY are not set"),
        ("clearml", {"CLEARML_API_HOST": "https://example.com"}, "but CLEARML_API_ACCESS_KEY and CLEARML_API_SECRET"),
        ("mlflow", {}, "MLFLOW_TRACKING_URI is not set.*sqlite:///mlflow.db"),
        ("mlflow", {"MLFLOW_TRACKING_URI": "file:///tmp/x"}, "MLFLOW_TRACKING_URI is a folder.*sqlite"),
        ("mlflow", {"MLFLOW_TRACKING_URI": "./mlruns"}, "MLFLOW_TRACKING_URI is a folder"),
        ("trackio", {"TRACKIO_SPACE_ID": "me/space"}, "HF_TOKEN is not set"),
        ("trackio", {"TRACKIO_SERVER_URL": "https://example.com"}, "TRACKIO_WRITE_TOKEN is not"),
    ],
)
def test_what_a_tracker_needs(name, environment, message, monkeypatch):
    monkeypatch.setattr(TRACKERS[name], "modules", ())
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=message) as error:
        preflight(settings(trackers=[name]))
    assert TOKEN not in str(error.value)
    assert "\n" not in str(error.value)
    preflight(settings(trackers=[name], offline=True))


@pytest.mark.parametrize(
    ("name", "environment"),
    [
        ("wandb", {"WANDB_API_KEY": "a" * 40}),
        ("wandb", {"WANDB_MODE": "offline"}),
        ("mlflow", {"MLFLOW_TRACKING_URI": "sqlite:///m.db"}),
        ("mlflow", {"MLFLOW_TRACKING_URI": "https://example.com"}),
        ("trackio", {}),
        ("trackio", {"TRACKIO_SERVER_URL": "https://example.com?write_token=x"}),
        ("trackio", {"TRACKIO_SPACE_ID": "me/space", "HF_TOKEN": TOKEN}),
        ("clearml", {"CLEARML_CONFIG_FILE": "here.conf"}),
        (
            "clearml",
            {
                "CLEARML_API_HOST": "https://example.com",
                "CLEARML_API_ACCESS_KEY": "A" * 20,
                "CLEARML_API_SECRET_KEY": "a" * 50,
            },
        ),
    ],
)
def test_what_is_enough_for_a_tracker(name, environment, monkeypatch):
    monkeypatch.setattr(TRACKERS[name], "modules", ())
    open("here.conf", "w").close()
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    found = preflight(settings(trackers=[name]))
    assert set(found) == {c.variable for c in CREDENTIALS} & set(environment)


def test_a_tracker_is_named_once():
    with pytest.raises(ValueError, match="trackers names one twice"):
        settings(trackers=["wandb", "wandb"])


def test_a_clearml_server_that_is_not_there():
    """ClearML itself would try for hours. Any answer will do."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        require_answer(f"{address}/")
        server.shutdown()
        thread.join()
    with pytest.raises(UltravoxError, match=f"the server {address} does not answer"):
        require_answer(address)
    with pytest.raises(UltravoxError, match="the server nowhere does not answer"):
        require_answer("nowhere")


# A store that is no folder of the run


def test_mlflow_logs_into_a_database_of_ones_own(tmp_path, monkeypatch):
    require_trackers("mlflow")
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'own.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)  # where MLflow puts artifacts by default
    place = TrackerOptions("speech", "name", tmp_path / "unused")
    for _ in range(2):  # the second run finds the experiment
        tracker = MlflowTracker(place)
        run_id = tracker.start(None, {"a": {"b c!": [{"d": 1}]}})
        tracker.log({"tune/loss": 1.5}, 3)
        tracker.finish("stopped")
        tracker.stack.close()
    tracker = MlflowTracker(place)
    assert tracker.start(run_id, {"a": {"b c!": [{"d": 2}]}}) == run_id
    tracker.log({"tune/loss": 1.25}, 4)
    tracker.finish("failed")
    client = MlflowClient(tracking_uri=uri)
    history = client.get_metric_history(run_id, "tune/loss")
    assert [(metric.step, metric.value) for metric in history] == [(3, 1.5), (4, 1.25)]
    run = client.get_run(run_id)
    assert (run.info.status, run.data.params) == ("FAILED", {"a.b c_.0.d": "1"})
    assert len(client.search_runs([run.info.experiment_id])) == 2
    assert not (tmp_path / "unused").exists()


def test_a_configuration_in_mlflows_words():
    config = {"a": 1, "b": {"c": [1, 2], "d e": None}, "s": [{"n": "x"}, {"n": "y"}], "o": {"k=é*": 1}}
    assert flat(config) == {"a": 1, "b.c": [1, 2], "b.d e": None, "s.0.n": "x", "s.1.n": "y", "o.k_é_": 1}
