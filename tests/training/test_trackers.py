"""Every tracker through a real run, offline, stopped and gone on with; read back with what reads its own format.

The run has 4 steps of `align` and 6 of `tune`, the second process does the last two of them.
"""

import json
import math
import os
import sqlite3
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from tracked_run import logged, require_trackers, short_config

from ultravox.audio.waveform import load_waveform
from ultravox.training.run import run_training

TRACKERS = ("wandb", "mlflow", "clearml", "trackio")
CANARIES = {
    "HF_TOKEN of .env": "hf_fileCanaryfileCanaryfileCanary0",
    "HF_TOKEN of the vault": "hf_vaultCanaryvaultCanaryvaultCanary1",
    "WANDB_API_KEY": "wandbCanarywandbCanarywandbCanarywandbCanary2",
    "CLEARML_API_ACCESS_KEY": "CLEARMLCANARYCLEARMLCANARY3",
    "CLEARML_API_SECRET_KEY": "clearmlCanaryclearmlCanaryclearmlCanary4",
}
STEPS = [f"align/{step}" for step in range(1, 5)] + [f"tune/{step}" for step in range(1, 7)]


@pytest.fixture(scope="module")
def tracked(parts, tmp_path_factory):
    """The run's folder, and all that its two processes have printed."""
    require_trackers(*TRACKERS)
    folder = tmp_path_factory.mktemp("tracked")
    run_dir = folder / "run"
    config = short_config(parts, run_dir, trackers=list(TRACKERS), offline=True, upload_checkpoints=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    (folder / "home").mkdir()
    kept = ("WANDB", "MLFLOW", "CLEARML", "TRACKIO", "HF_TOKEN", "AZURE")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(kept)} | {
        "HOME": str(folder / "home"),
        "ULTRAVOX_HOME": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        **{name: CANARIES[name] for name in ("WANDB_API_KEY", "CLEARML_API_ACCESS_KEY", "CLEARML_API_SECRET_KEY")},
    }
    (folder / ".env").write_text(f"HF_TOKEN={CANARIES['HF_TOKEN of .env']}\n")
    outputs = []
    for part, expected in (("first", 130), ("second", 0)):
        command = [sys.executable, Path(__file__).with_name("tracked_run.py"), "config.yaml", part]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == expected, done.stdout + done.stderr
        outputs.append(done.stdout + done.stderr)
        (folder / ".env").unlink(missing_ok=True)
        environment["AZURE_KEY_VAULT_URL"] = "https://example.com/v"
        environment["TOKEN_OF_THE_VAULT"] = CANARIES["HF_TOKEN of the vault"]
    return run_dir, "\n".join(outputs)


@pytest.fixture(scope="module")
def plain(parts, tmp_path_factory):
    """The same run, uninterrupted and without trackers."""
    return run_training(short_config(parts, tmp_path_factory.mktemp("plain") / "run"))


def ids(run_dir, name):
    content = json.loads((run_dir / "trackers.json").read_text())
    assert content["version"] == 1
    assert (content["runs"][name]["project"], content["runs"][name]["offline"]) == ("ultravox", True)
    return content["runs"][name]["ids"]


def assert_same_losses(found, run_dir):
    """Each step once, on one axis over both stages, with the value of the log."""
    expected = logged(run_dir)
    assert list(expected) == STEPS
    assert [step for step, _, _ in found] == list(range(1, 11))
    for step, stage, loss in found:
        assert loss == pytest.approx(expected[f"{stage}/{step - 4 * (stage == 'tune')}"], abs=1e-6)


def assert_recordings(files, run_dir):
    """Three clips at each of the two evaluations, the same ones, as they sound."""
    waveforms = sorted((load_waveform(path) for path in files), key=lambda one: (len(one), float(one[37])))
    assert len(waveforms) == 6
    assert len({waveform.tobytes() for waveform in waveforms}) <= 3
    assert all(
        len(waveform) % 3200 == 0 and abs(waveform).max() == pytest.approx(0.3, abs=0.01) for waveform in waveforms
    )


def test_trackers_do_not_touch_the_numbers(tracked, plain):
    assert logged(tracked[0]) == logged(plain)
    assert "lost" not in tracked[1]
    assert "could not" not in tracked[1]


# Read back


def wandb_records(path):
    """Records of a `.wandb` file: protobuf in LevelDB's log format, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last of several
            yield Record.FromString(part)
            part = b""


def test_wandb(tracked):
    run_dir, _ = tracked
    folders = sorted((run_dir / "trackers" / "wandb" / "wandb").glob("offline-run-*"))
    [run_id] = ids(run_dir, "wandb")
    assert [folder.name.rpartition("-")[2] for folder in folders] == [run_id, run_id]
    records = [record for folder in folders for record in wandb_records(folder / f"run-{run_id}.wandb")]
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert {(run.run_id, run.project, run.display_name) for run in runs} == {(run_id, "ultravox", "run")}
    config = {update.key: json.loads(update.value_json) for update in runs[0].config.update}
    assert config["stages"][1]["max_steps"] == 6
    rows = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    losses = [
        (row["step"], stage, row[f"{stage}/loss"])
        for row in rows
        for stage in ("align", "tune")
        if f"{stage}/loss" in row
    ]
    assert_same_losses(losses, run_dir)
    assert [row["step"] for row in rows if "align/wer" in row or "tune/wer" in row] == [4, 10]
    artifacts = [record.artifact for record in records if record.WhichOneof("record_type") == "artifact"]
    checkpoints = [artifact for artifact in artifacts if artifact.type == "checkpoint"]
    names = ["align-000004", "tune-000004", "tune-000006"]
    assert [sorted(one.aliases) for one in checkpoints] == [sorted([name, "latest"]) for name in names]
    assert {entry.path for entry in checkpoints[0].manifest.contents} >= {"trainable.safetensors", "manifest.json"}
    files = [path for folder in folders for path in folder.rglob("*")]
    tables = [json.loads(path.read_text()) for path in files if path.name.endswith(".table.json")]
    assert [one["columns"] for one in tables] == [["clip", "reference", "hypothesis"]] * 2
    assert [len(one["data"]) for one in tables] == [3, 3]
    assert_recordings([path for path in files if path.suffix == ".wav"], run_dir)


def test_mlflow(tracked):
    from mlflow import MlflowClient

    run_dir, _ = tracked
    folder = run_dir / "trackers" / "mlflow"
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    [run_id] = ids(run_dir, "mlflow")
    experiment = client.get_experiment_by_name("ultravox")
    [run] = client.search_runs([experiment.experiment_id])
    assert (run.info.run_id, run.info.run_name, run.info.status) == (run_id, "run", "FINISHED")
    assert run.data.params["stages.1.max_steps"] == "6"
    losses = [
        (metric.step, stage, metric.value)
        for stage in ("align", "tune")
        for metric in client.get_metric_history(run_id, f"{stage}/loss")
    ]
    assert_same_losses(losses, run_dir)
    assert [metric.step for metric in client.get_metric_history(run_id, "tune/wer")] == [10]
    place = folder / "artifacts" / run_id / "artifacts"
    assert json.loads((place / "config.json").read_text())["stages"][0]["max_steps"] == 4
    table = json.loads((place / "transcripts" / "tune.json").read_text())
    assert table["columns"] == ["step", "clip", "reference", "hypothesis"]
    assert [row[0] for row in table["data"]] == [10, 10, 10]
    names = sorted(path.name for path in (place / "checkpoints").iterdir())
    assert names == ["align-000004", "tune-000004", "tune-000006"]
    assert_recordings(place.rglob("*.wav"), run_dir)


def test_clearml(tracked):
    """Offline it cannot go on with a session: there are two, and the second names the first."""
    run_dir, output = tracked
    first, second = ids(run_dir, "clearml")
    assert f"clearml: run {first} cannot be gone on with; a new one began, {second}" in output
    tasks, events, waves = [], [], []
    for name in (first, second):
        path = run_dir / "trackers" / "clearml" / "offline" / name
        with zipfile.ZipFile(f"{path}.zip") as archive:
            tasks.append(json.loads(archive.read("task.json")))
            events += [event for line in archive.read("metrics.jsonl").splitlines() for event in json.loads(line)]
        waves += path.rglob("*.wav")
    assert [(task["id"], task["name"], task["project_name"]) for task in tasks] == [
        (first, "run", "ultravox"),
        (second, "run", "ultravox"),
    ]
    assert tasks[1]["comment"] == f"goes on with {first}"
    assert "max_steps = 6" in tasks[0]["configuration"]["run"]["value"]
    losses = [(e["iter"], e["variant"], e["value"]) for e in events if e.get("metric") == "loss"]
    assert_same_losses(losses, run_dir)
    tables = [json.loads(e["plot_str"]) for e in events if e["type"] == "plot" and e["metric"] == "transcripts"]
    assert [len(table["data"][0]["cells"]["values"]) for table in tables] == [3, 3]
    artifacts = [one["key"] for task in tasks for one in task["execution"]["artifacts"]]
    assert sorted(artifacts) == ["align-000004", "tune-000004", "tune-000006"]
    assert_recordings(waves, run_dir)


def test_trackio(tracked):
    run_dir, _ = tracked
    folder = run_dir / "trackers" / "trackio"
    [run_id] = ids(run_dir, "trackio")
    with sqlite3.connect(folder / "ultravox.db") as database:
        rows = database.execute("select run_id, run_name, step, metrics from metrics order by id").fetchall()
        [config] = database.execute("select config from configs").fetchone()
        artifacts = database.execute("select count(*) from artifact_versions").fetchone()
        aliases = {alias for [alias] in database.execute("select alias from artifact_aliases")}
    assert {row[:2] for row in rows} == {(run_id, "run")}
    assert json.loads(config)["stages"][1]["max_steps"] == 6
    parsed = [(step, json.loads(metrics)) for _, _, step, metrics in rows]
    losses = [
        (step, stage, row[f"{stage}/loss"])
        for step, row in parsed
        for stage in ("align", "tune")
        if f"{stage}/loss" in row
    ]
    assert_same_losses(losses, run_dir)
    tables = [row[key]["_value"] for _, row in parsed for key in row if key.endswith("/transcripts")]
    assert [sorted(table[0]) for table in tables] == [["clip", "hypothesis", "reference"]] * 2
    assert artifacts == (3,)
    assert {"align-000004", "tune-000004", "tune-000006"} <= aliases
    assert_recordings((folder / "media").rglob("*.wav"), run_dir)


def test_no_secret_is_anywhere(tracked):
    """All bytes that the run has written or said, archives unpacked."""
    run_dir, output = tracked
    texts = {"output": output.encode()}
    for path in run_dir.parent.rglob("*"):
        if path.is_file() and path.name != ".env":
            texts[str(path)] = path.read_bytes()
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    texts |= {f"{path}:{name}": archive.read(name) for name in archive.namelist()}
    assert len(texts) > 100
    # what is known to be there is found by the same look
    for name in TRACKERS:
        assert any(f"/{name}/" in place and b"projector_hidden_size" in text for place, text in texts.items()), name
    assert {"token fileC", "token vault"} <= set(output.splitlines())
    leaks = [
        (place, what) for place, text in texts.items() for what, value in CANARIES.items() if value.encode() in text
    ]
    assert leaks == []


def test_the_numbers_are_finite_and_of_both_kinds(tracked):
    """What a stage logs besides its loss, and that nothing of it is NaN."""
    from mlflow import MlflowClient

    run_dir, _ = tracked
    client = MlflowClient(tracking_uri=f"sqlite:///{run_dir / 'trackers' / 'mlflow' / 'mlflow.db'}")
    metrics = client.get_run(ids(run_dir, "mlflow")[0]).data.metrics
    assert all(math.isfinite(value) for value in metrics.values())
    wanted = {"align/ctc", "align/wer", "tune/token_accuracy", "tune/lr_projector", "tune/grad_norm", "tune/wer"}
    assert wanted <= set(metrics)
