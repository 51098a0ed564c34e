"""Whole runs on tiny models: what they leave behind, resuming, refusals, bad data."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import tiny_config

from ultravox.cli.main import main
from ultravox.config.load import dump_config
from ultravox.data.cache import FeatureCache
from ultravox.errors import CheckpointError, ConfigError, DataError, UltravoxError
from ultravox.model.folder import find_model_folder
from ultravox.training.align import AlignTask
from ultravox.training.checkpoint import list_checkpoints
from ultravox.training.flops import num_matmul_parameters
from ultravox.training.interrupt import TrainingInterrupted
from ultravox.training.run import run_training
from ultravox.training.run_folder import lock
from ultravox.training.tune import TuneTask

STAGES = ["align", "tune"]


def short_config(parts, run_dir, steps=(7, 10), **stage_changes):
    config = tiny_config(*parts, run_dir).model_dump(mode="json")
    for stage, count in zip(config["stages"], steps, strict=True):
        stage["max_steps"] = count
        stage["optim"]["warmup_steps"] = min(3, count)
        stage.update(stage_changes)
    return type(tiny_config(*parts, run_dir)).model_validate(config)


def losses(run_dir):
    rows = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [(row["stage"], row["step"], row["loss"]) for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def whole(parts, tmp_path_factory):
    """One uninterrupted run, to hold the interrupted ones against."""
    os.environ.setdefault("ULTRAVOX_HOME", str(tmp_path_factory.getbasetemp() / "home"))
    return run_training(short_config(parts, tmp_path_factory.mktemp("whole") / "run"))


def assert_same_run(run_dir, other):
    assert losses(run_dir) == losses(other)
    weights, expected = (load_file(folder / "model" / "model.safetensors") for folder in (run_dir, other))
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected[name]), name


def stop_at(monkeypatch, task, call, action):
    """Do something in the middle of the `call`-th loss of a task."""
    inner, calls = task.loss, []

    def loss(self, batch):
        calls.append(batch)
        if len(calls) == call:
            action()
        return inner(self, batch)

    monkeypatch.setattr(task, "loss", loss)


def test_what_a_run_leaves_behind(whole):
    names = {path.name for path in whole.iterdir()}
    assert {"config.yaml", "log.jsonl", "checkpoints", "model", "train.json"} <= names
    summary = json.loads((whole / "train.json").read_text())
    assert summary["version"] == 1
    assert [stage["steps"] for stage in summary["stages"]] == [7, 10]
    assert summary["train_seconds"] > sum(stage["seconds"] for stage in summary["stages"])
    assert summary["peak_memory_bytes"] > 1e8
    tune = summary["stages"][1]
    assert tune["matmul_utilisation"] == pytest.approx(
        4 * tune["num_matmul_parameters"] * tune["num_tokens"] / tune["seconds"] / tune["matmul_flop_rate"]
    )
    work = 4 * tune["num_matmul_parameters"] * tune["num_tokens"] / tune["seconds"]
    assert tune["utilisation_of_usual"] == pytest.approx(work / tune["usual_matmul_flop_rate"])
    assert tune["usual_matmul_flop_rate"] <= tune["matmul_flop_rate"]
    assert tune["num_matmul_samples"] == 2  # of ten steps: after the tenth, and at the end
    assert not [path for path in whole.rglob("*") if path.suffix in {".pt", ".bin", ".pkl"}]
    steps = [(stage, step) for stage, step, _ in losses(whole)]
    assert steps == [("align", n) for n in range(1, 8)] + [("tune", n) for n in range(1, 11)]
    wer = [row for row in map(json.loads, (whole / "log.jsonl").read_text().splitlines()) if "wer" in row]
    assert [row["stage"] for row in wer] == STAGES


def test_the_model_loads_and_its_adapters_are_merged(whole):
    from ultravox.model.factory import load_model

    model, _ = load_model(whole)
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    trained = load_file(list_checkpoints(whole, STAGES)[-1] / "trainable.safetensors")
    weight = trained["multi_modal_projector.linear_1.weight"]
    assert torch.equal(model.multi_modal_projector.linear_1.weight, weight)
    assert any(name.endswith("lora_B") and tensor.abs().max() > 0 for name, tensor in trained.items())


def test_tokens_are_counted_without_padding(parts, whole, tmp_path):
    stage = json.loads((whole / "train.json").read_text())["stages"][1]
    assert 0 < stage["num_tokens"] <= 10 * 2 * 200
    assert stage["num_matmul_parameters"] == 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64 + 2 * 32) + 32


@pytest.mark.parametrize(("task", "call", "stage"), [(AlignTask, 5, "align"), (TuneTask, 13, "tune")])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_then_resume_is_bit_exact(parts, whole, tmp_path, monkeypatch, task, call, stage, number, code):
    """With masks, noise, speeds and accumulation on; the signal arrives in mid-step, mid-accumulation and mid-epoch."""
    config = short_config(parts, tmp_path / "run")
    with monkeypatch.context() as patch:
        stop_at(patch, task, call, lambda: os.kill(os.getpid(), number))
        with pytest.raises(TrainingInterrupted) as caught:
            run_training(config)
    assert caught.value.exit_code == code
    assert list_checkpoints(tmp_path / "run", STAGES)[-1].name.startswith(stage)
    assert not (tmp_path / "run" / "model").exists()
    torch.manual_seed(99)
    run_training(config, resume=True)
    assert_same_run(tmp_path / "run", whole)


def test_killed_outright_then_resume_is_bit_exact(parts, whole, tmp_path):
    """Another process dies at once (as of kill -9) four micro-batches after its last checkpoint."""
    config = short_config(parts, tmp_path / "run", checkpoint_every=3)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    script = f"""
import os, sys
sys.path[:0] = {[p for p in sys.path if p]!r}
import torch
torch.set_num_threads({torch.get_num_threads()})
from ultravox.config.schema import RunConfig
from ultravox.training.run import run_training
from ultravox.training.run_folder import lock
from ultravox.training.tune import TuneTask
inner, calls = TuneTask.loss, []
def loss(self, batch):
    calls.append(batch)
    if len(calls) == 10:
        os._exit(9)
    return inner(self, batch)
TuneTask.loss = loss
run_training(RunConfig.model_validate_json(open({str(tmp_path / "config.json")!r}).read()))
"""
    finished = subprocess.run([sys.executable, "-c", script], env=dict(os.environ), capture_output=True, text=True)
    assert finished.returncode == 9, finished.stderr
    assert list_checkpoints(tmp_path / "run", STAGES)[-1].name == "tune-000003"
    assert [step for stage, step, _ in losses(tmp_path / "run") if stage == "tune"] == [1, 2, 3, 4]
    run_training(config, resume=True)
    assert_same_run(tmp_path / "run", whole)


def test_resuming_a_finished_run_changes_nothing_and_says_so(parts, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    written(tmp_path / "run.yaml", short_config(parts, tmp_path / "run"))
    before = contents(tmp_path / "run")
    assert main(["train", str(tmp_path / "run.yaml"), "--resume"]) == 0
    captured = capsys.readouterr()
    after = contents(tmp_path / "run")
    assert {path: after[path] for path in before if path.name not in ("config.yaml", ".lock")} == {
        path: before[path] for path in before if path.name not in ("config.yaml", ".lock")
    }, "train.json too: the time that looking took is no time of training"
    run = tmp_path / "run"
    told = f"{run} is finished (steps: align 7, tune 10); nothing is left to train. To train longer, begin a new run "
    assert told in captured.err
    assert f"--run_dir {run}-longer --stages.tune.max_steps 20" in captured.err
    assert captured.out.splitlines()[0] == f"model  {run / 'model'}"
    (tmp_path / "run" / "train.json").unlink()  # killed before its last act
    run_training(short_config(parts, tmp_path / "run"), resume=True)
    assert (
        json.loads((tmp_path / "run" / "train.json").read_text())["stages"]
        == json.loads((whole / "train.json").read_text())["stages"]
    )


def test_a_run_ends_with_what_comes_next(parts, tmp_path, capsys):
    run = tmp_path / "my run"
    written(tmp_path / "run.yaml", short_config(parts, run, steps=(1, 1)))
    assert main(["train", str(tmp_path / "run.yaml")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"model  {run / 'model'}",
        f"next   ultravox evaluate '{run}'",
        f"       ultravox ask '{run}' --audio FILE",
    ]
    written(tmp_path / "run.yaml", short_config(parts, run, steps=(1, 2)))
    assert main(["train", str(tmp_path / "run.yaml"), "--resume"]) == 2
    captured = capsys.readouterr()
    assert "the configuration differs: stages.tune.max_steps was 1, is 2; " in captured.err
    assert "a run cannot be made longer or shorter" in captured.err
    assert captured.out == ""


def written(path, config):
    path.write_text(dump_config(config))
    return path


def test_second_run_encodes_nothing(parts, tmp_path, monkeypatch):
    reports = []
    inner = FeatureCache.build

    def build(self, *args, **kwargs):
        reports.append(inner(self, *args, **kwargs))
        return reports[-1]

    monkeypatch.setattr(FeatureCache, "build", build)
    monkeypatch.setenv("ULTRAVOX_HOME", str(tmp_path / "home"))
    for name in "ab":
        run_training(short_config(parts, tmp_path / name, steps=(1, 1)))
    assert reports[0].num_encoder_calls > 0
    assert reports[1].num_encoder_calls == 0


def test_other_config_data_or_damage_is_refused_before_anything_is_touched(parts, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    config = short_config(parts, tmp_path / "run").model_dump(mode="json")
    config["stages"][1]["optim"]["lr"]["projector"] = 0.5
    changed = type(tiny_config(*parts, tmp_path)).model_validate(config)
    with pytest.raises(CheckpointError, match=r"stages\.tune\.optim\.lr\.projector was 0\.003, is 0\.5; restore it"):
        run_training(changed, resume=True)
    newest = list_checkpoints(tmp_path / "run", STAGES)[-1] / "trainable.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"trainable\.safetensors is damaged"):
        run_training(short_config(parts, tmp_path / "run"), resume=True)
    assert_same_run(tmp_path / "run", whole)


def test_changed_manifest_is_refused(parts, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    shutil.copytree(parts[1], tmp_path / "tones")
    state = tmp_path / "run" / "config.yaml"
    assert state.is_file()
    # The dataset keeps its name for the config; only its content changes.
    original = parts[1] / "train.jsonl"
    saved = {name: (parts[1] / name).read_bytes() for name in ("train.jsonl", "dataset.json")}
    try:
        rows = original.read_text().splitlines()
        row = json.loads(rows[3])
        rows[3] = json.dumps({**row, "text": row["text"] + " one"})
        original.write_text("\n".join(rows) + "\n")
        info = json.loads(saved["dataset.json"])
        del info["splits"]["train"]["sha256"]
        (parts[1] / "dataset.json").write_text(json.dumps(info))
        with pytest.raises(
            CheckpointError,
            match=r"the training data differs: .*tones/train/transcription has \d+ clips as b",
        ):
            run_training(short_config(parts, tmp_path / "run"), resume=True)
    finally:
        for name, content in saved.items():
            (parts[1] / name).write_bytes(content)


@pytest.mark.parametrize("change", ["answer's template", "recording"])
def test_changed_tokens_or_audio_are_refused(parts, tmp_path, change):
    """The manifest stays as it is; a resume notices nevertheless."""
    models = tmp_path / "llm", parts[0][1]
    shutil.copytree(parts[0][0], models[0])
    shutil.copytree(parts[1], tmp_path / "tones")
    config = short_config((models, tmp_path / "tones"), tmp_path / "run", steps=(1, 1))
    run_training(config)
    if change == "recording":
        shutil.copy(tmp_path / "tones" / "audio" / "001.wav", tmp_path / "tones" / "audio" / "000.wav")
    else:
        template = models[0] / "chat_template.jinja"
        template.write_text(template.read_text().replace("\n", " "))
    with pytest.raises(CheckpointError, match=r"the training data differs: .*tones/train/answer"):
        run_training(config, resume=True)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_earlier_run_is_replaced_only_when_told_so(parts, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"holds a finished run, which --resume trains no further: replace it"):
        run_training(short_config(parts, tmp_path / "run"))
    assert contents(tmp_path / "run") == before
    (tmp_path / "run" / "train.json").unlink()
    shutil.rmtree(tmp_path / "run" / "model")
    with pytest.raises(ConfigError, match=r"holds a run with checkpoints: go on with it \(--resume\), replace it"):
        run_training(short_config(parts, tmp_path / "run"))
    assert list_checkpoints(tmp_path / "run", STAGES)


def test_an_earlier_run_stays_until_the_new_one_is_ready(parts, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    before = contents(tmp_path / "run")
    config = short_config(parts, tmp_path / "run").model_dump(mode="json")
    for section, key in (("model", "language_model"), ("data", "sources")):
        bad = {**config, section: {**config[section], key: str(tmp_path / "absent")}}
        if key == "sources":
            bad[section][key] = [{"name": str(tmp_path / "absent")}]
        with pytest.raises(UltravoxError, match="absent"):
            run_training(type(short_config(parts, tmp_path)).model_validate(bad), overwrite=True)
        assert contents(tmp_path / "run") == before


def test_a_new_run_removes_what_the_earlier_one_left(parts, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "evaluations" / "other-heldout").mkdir(parents=True)
    (tmp_path / "run" / "evaluations" / "other-heldout" / "results.json").write_text("{}")
    (tmp_path / "run" / "report.html").write_text("old")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    run_training(short_config(parts, tmp_path / "run", steps=(1, 1)), overwrite=True)
    names = {path.name for path in (tmp_path / "run").iterdir()} - {".lock"}
    assert names == {"config.yaml", "log.jsonl", "checkpoints", "model", "train.json", "notes.txt"}


def test_resuming_without_a_checkpoint_is_refused_and_leaves_nothing(parts, tmp_path):
    config = short_config(parts, tmp_path / "run", steps=(1, 1))
    with pytest.raises(ConfigError, match=r"holds no checkpoint of these stages to go on from: leave out --resume"):
        run_training(config, resume=True)
    assert not (tmp_path / "run").exists()


def test_a_run_killed_in_its_first_save_begins_anew(parts, tmp_path):
    config = short_config(parts, tmp_path / "run", steps=(1, 1))
    (tmp_path / "run" / "checkpoints" / ".align-000001.tmp").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("version: 1\n")
    with pytest.raises(ConfigError, match="to go on from: begin with --overwrite"):
        run_training(config, resume=True)
    with pytest.raises(CheckpointError, match=r"its training has not finished$"):
        find_model_folder(tmp_path / "run")
    assert (run_training(config) / "train.json").is_file()


def test_rows_that_are_not_packed_count_their_padding(parts, tmp_path, monkeypatch):
    tasks, sizes, inner = [], [], TuneTask.loss

    def loss(self, batch):
        pairs = zip(batch.input_ids, batch.audio_tokens, strict=True)
        longest = max(len(ids) - 1 + sum(counts) for ids, counts in pairs)
        sizes.append(longest * len(batch.ids))
        tasks.append(self)
        return inner(self, batch)

    monkeypatch.setattr(TuneTask, "loss", loss)
    for dtype, counts_padding in (("float32", False), ("bfloat16", True)):
        sizes.clear()
        config = short_config(parts, tmp_path / dtype, steps=(0, 9), max_batch_tokens=1000).model_dump(mode="json")
        config["model"]["dtype"] = dtype
        run_training(type(short_config(parts, tmp_path)).model_validate(config))
        assert (tasks[-1].plan_mode == "padded") == counts_padding
        assert max(sizes) <= 1000 or not counts_padding


def test_callbacks_are_closed_when_one_cannot_be_made(parts, tmp_path, monkeypatch):
    import ultravox.training.watchers as module

    closed = []

    def refuse(*args, **kwargs):
        raise OSError("no terminal")

    monkeypatch.setattr(module.JsonLinesLog, "close", lambda self: closed.append(self.path))
    monkeypatch.setattr(module, "TerminalProgress", refuse)
    with pytest.raises(OSError, match="no terminal"):
        run_training(short_config(parts, tmp_path / "run", steps=(1, 1)))
    assert closed == [tmp_path / "run" / "log.jsonl"]


def test_each_stage_has_its_own_tensorboard_folder(parts, tmp_path):
    pytest.importorskip("tensorboard")
    config = short_config(parts, tmp_path / "run", steps=(1, 1)).model_dump(mode="json")
    config["logging"]["tensorboard"] = True
    run_training(type(short_config(parts, tmp_path)).model_validate(config))
    files = (tmp_path / "run" / "tensorboard").rglob("events.*")
    assert sorted(path.parent.name for path in files) == STAGES


def test_features_of_normalised_and_of_raw_samples_are_kept_apart(tiny_model):
    from types import SimpleNamespace

    from transformers import HubertConfig

    from ultravox.model.audio_encoder import WaveformAudioEncoder
    from ultravox.training.features import Features

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = HubertConfig(**small, conv_dim=(8,) * 7, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    encoders = [WaveformAudioEncoder(config, normalize=normalize) for normalize in (True, False)]
    keys = [Features(SimpleNamespace(audio_tower=encoder), "float16").cache.key for encoder in encoders]
    assert keys[0].encoder_hash == keys[1].encoder_hash == "features only"
    assert keys[0].folder() != keys[1].folder()
    assert Features(tiny_model, "float16").cache.key.preprocessing == "LogMel-1", "existing caches stay valid"


def test_a_folder_with_other_things_is_not_cleared(parts, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("three years")
    with pytest.raises(ConfigError, match="holds files but no run"):
        run_training(short_config(parts, tmp_path / "run"))
    assert (tmp_path / "run" / "thesis.txt").read_text() == "three years"


def test_two_trainings_in_one_folder(parts, tmp_path):
    import fcntl

    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UltravoxError, match="another process is training"):
            run_training(short_config(parts, tmp_path / "run"))
    with ExitStack() as stack:
        lock(tmp_path / "run", stack)
        for _ in range(2):
            with pytest.raises(UltravoxError, match=rf"another process \(pid {os.getpid()}\) is training in .*: wait"):
                run_training(short_config(parts, tmp_path / "run"))
    assert (tmp_path / "run" / ".lock").read_bytes() == b""


def test_clips_that_ctc_has_no_room_for_are_named(parts, tmp_path, capsys):
    config = tiny_config(*parts, tmp_path / "run").model_dump(mode="json")
    config["model"]["stack_factor"] = 10  # one position for each word: none for a blank between two equal ones
    for stage in config["stages"]:
        stage["max_steps"], stage["optim"]["warmup_steps"] = 1, 0
    run_training(type(tiny_config(*parts, tmp_path / "run")).model_validate(config))
    align, tune = json.loads((tmp_path / "run" / "train.json").read_text())["stages"]
    assert align["left_out"]
    assert 0 < align["num_examples"] < tune["num_examples"]
    assert all(name.startswith("tone-") for name in align["left_out"])
    assert tune["left_out"] == []
    assert f"{len(align['left_out'])} versions of" in capsys.readouterr().err


def test_bad_clips_fail_the_run_by_reason(parts, tmp_path, capsys):
    tmp_path = tmp_path / "calls [raw]"  # what rich would take for a style
    shutil.copytree(parts[1], tmp_path / "tones")
    (tmp_path / "tones" / "audio" / "003.wav").write_bytes(b"RIFFnonsense")
    config = short_config((parts[0], tmp_path / "tones"), tmp_path / "run", steps=(1, 1))
    with pytest.raises(DataError, match=r"2 of 42 clips cannot be used \(2 not readable as audio\)"):
        run_training(config)
    content = config.model_dump(mode="json")
    content["data"]["max_quarantine_share"] = 0.1
    run = run_training(type(config).model_validate(content))
    summary = json.loads((run / "train.json").read_text())
    assert summary["quarantined"] == {"not readable as audio": 2}
    (named,) = summary["quarantined_files"].values()
    path = tmp_path / "tones" / "audio" / "003.wav"
    assert named == [str(path), f"{path} (tone-003, source 2)"], "a row of each source"
    assert named[0] in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("part", ["audio_encoder_lora", "train_audio_encoder"])
def test_the_encoder_trains_when_asked(parts, tmp_path, part):
    """Founding idea: end to end. The encoder's weights in the saved model differ from the base's."""
    config = short_config(parts, tmp_path / "run", steps=(2, 2)).model_dump(mode="json")
    if part == "train_audio_encoder":
        config["model"]["train_audio_encoder"] = True
    else:
        config["model"]["audio_encoder_lora"] = {"rank": 2, "target_modules": ["q_proj", "v_proj"]}
    run = run_training(type(tiny_config(*parts, tmp_path)).model_validate(config))
    after = load_file(run / "model" / "model.safetensors")["audio_tower.layers.0.self_attn.q_proj.weight"]
    before = load_file(parts[0][1] / "model.safetensors")
    before = next(v for k, v in before.items() if k.endswith("encoder.layers.0.self_attn.q_proj.weight"))
    assert not torch.equal(after, before)
    assert "audio_encoder" in str((run / "config.yaml").read_text())


def test_bfloat16_runs(parts, tmp_path):
    config = short_config(parts, tmp_path / "run", steps=(3, 3)).model_dump(mode="json")
    config["model"]["dtype"] = "bfloat16"
    run = run_training(type(tiny_config(*parts, tmp_path)).model_validate(config))
    assert all(loss is not None and loss > 0 for _, _, loss in losses(run))


def test_the_trainer_knows_no_model():
    source = Path(run_training.__code__.co_filename).parent
    for name in ("trainer.py", "task.py", "optim.py", "interrupt.py"):
        text = (source / name).read_text()
        assert "ultravox.model" not in text
        assert "ultravox.data" not in text


def test_matmul_parameters_leave_out_tables_and_adapters(parts):
    from ultravox.config.model import ModelConfig
    from ultravox.model.factory import load_language_model

    model = load_language_model(str(parts[0][0]))
    plain = num_matmul_parameters(model)
    from ultravox.model.adapters import add_lora

    add_lora(model, 4, 8.0, ModelConfig().language_model_lora.target_modules)
    assert num_matmul_parameters(model) == plain
    assert plain == sum(p.numel() for n, p in model.named_parameters() if "embed" not in n and "lora" not in n)


def test_a_rate_of_what_does_not_train_is_told(parts, tmp_path, capsys):
    content = short_config(parts, tmp_path / "run", steps=(1, 1)).model_dump(mode="json")
    for stage in content["stages"]:
        stage["optim"]["lr"] = {"projector": 1e-3, "language_model": 1e-3}
    content["stages"][1]["optim"]["lr"]["audio_encoder"] = 1e-4
    run_training(type(short_config(parts, tmp_path)).model_validate(content))
    told = capsys.readouterr().err
    assert told.count("has no effect") == 1
    assert "stage tune: optim.lr.audio_encoder is set, but nothing of the audio_encoder trains" in told
