"""Runs on what only the data engine can do: waveforms augmented, several tasks and prompts, text alone, mixtures."""

import json
import os
import re
import shutil
import signal

import pytest
import soundfile
from tiny_run import WAVEFORM, tiny_config

from ultravox.cli.main import main
from ultravox.data.order import Position
from ultravox.data.sources import load_clips
from ultravox.errors import ConfigError, DataError
from ultravox.model.factory import build_model, build_processor
from ultravox.training.features import Features
from ultravox.training.interrupt import TrainingInterrupted
from ultravox.training.run import run_training
from ultravox.training.speech import prepare_speech
from ultravox.training.tune import TuneTask


def config_of(parts, run_dir, *, steps=4, data=None, **stage):
    """A stage `tune` alone."""
    content = tiny_config(*parts, run_dir).model_dump(mode="json")
    content["stages"] = [content["stages"][1] | {"max_steps": steps, **stage}]
    content["stages"][0]["optim"]["warmup_steps"] = 0
    content["data"] |= {"sources": content["data"]["sources"][:1], **(data or {})}
    return type(tiny_config(*parts, run_dir)).model_validate(content)


def rows_of(run_dir):
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def losses(run_dir):
    return [row["loss"] for row in rows_of(run_dir) if "loss" in row]


def summary_of(run_dir):
    return json.loads((run_dir / "train.json").read_text())


def manifest(folder, rows):
    folder.mkdir(exist_ok=True)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def wavs(parts, tmp_path):
    """A function: the path of the n-th tone."""
    clips = load_clips(parts[1])
    return lambda number: str(clips[number].audio)


# Waveforms that are augmented, without a cache


@pytest.fixture(scope="module")
def augmented(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("augmented") / "run"
    return run_training(config_of(parts, folder, steps=6, augment={"waveform": WAVEFORM}))


def test_augmented_waveforms_are_decoded_in_every_epoch_and_nothing_is_cached(parts, augmented, tmp_path, monkeypatch):
    monkeypatch.setattr(Features, "encode", lambda *_: pytest.fail("nothing is to be cached"))
    again = run_training(config_of(parts, tmp_path / "run", steps=6, augment={"waveform": WAVEFORM}))
    assert losses(again) == losses(augmented)
    plain = run_training(config_of(parts, tmp_path / "plain", steps=6, data={"cache": "none"}, augment={}))
    assert losses(plain) != losses(augmented)


def test_workers_change_nothing(parts, augmented, tmp_path):
    config = config_of(
        parts, tmp_path / "run", steps=6, augment={"waveform": WAVEFORM}, data={"loader": {"workers": 2}}
    )
    assert losses(run_training(config)) == losses(augmented)


def test_a_stopped_run_goes_on_with_the_same_augmentation(parts, augmented, tmp_path, monkeypatch):
    config = config_of(parts, tmp_path / "run", steps=6, augment={"waveform": WAVEFORM})
    inner, calls = TuneTask.loss, []

    def loss(self, batch):
        calls.append(1)
        if len(calls) == 5:  # in the middle of the third step
            os.kill(os.getpid(), signal.SIGINT)
        return inner(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(TuneTask, "loss", loss)
        with pytest.raises(TrainingInterrupted):
            run_training(config)
    run_training(config, resume=True)
    assert losses(tmp_path / "run") == losses(augmented)


def test_cached_and_decoded_features_train_alike(parts, tmp_path):
    """Without augmentation of waveforms, the cache is a matter of time alone."""
    options = {"augment": {}, "data": {"feature_dtype": "float32"}}
    cached = run_training(config_of(parts, tmp_path / "cached", **options))
    options["data"]["cache"] = "none"
    live = run_training(config_of(parts, tmp_path / "live", **options))
    assert losses(live) == pytest.approx(losses(cached), rel=1e-4)


def test_epochs_on_cached_features_call_no_encoder(parts, tmp_path, monkeypatch):
    config = config_of(parts, tmp_path / "run", steps=12, max_batch_tokens=400)
    model, processor = build_model(config.model), build_processor(config.model)
    prepare_speech(config, model, processor)
    kind = type(model)
    monkeypatch.setattr(kind, "encode_audio", lambda *_: pytest.fail("the encoder was called"))
    run_training(config)
    stage = summary_of(tmp_path / "run")["stages"][0]
    assert stage["epochs"] >= 2
    assert 0 <= stage["data_wait_share"] < 1


# A recording that turns out to be damaged


def damaged_copy(parts, folder, count):
    """A copy of the tones, of which the last few cannot be decoded to their end."""
    shutil.copytree(parts[1], folder)
    for clip in load_clips(folder)[-count:]:
        content = clip.audio.read_bytes()
        clip.audio.write_bytes(content[: len(content) // 2])
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_recording_is_found_by_the_loader_and_named(parts, tmp_path, workers):
    folder = damaged_copy(parts, tmp_path / "tones", 1)
    name = load_clips(folder)[-1].id
    data = {"cache": "none", "max_quarantine_share": 0.05, "loader": {"workers": workers}}
    run_training(config_of((parts[0], folder), tmp_path / "run", steps=12, data=data))
    summary = summary_of(tmp_path / "run")
    assert summary["quarantined_files"] == {"damaged or truncated": [name]}
    assert summary["stages"][0]["skipped_steps"] == 0


def test_too_many_damaged_recordings_end_the_run(parts, tmp_path):
    folder = damaged_copy(parts, tmp_path / "tones", 4)
    with pytest.raises(DataError, match=r"damaged or truncated.*max_quarantine_share = 0\.05"):
        run_training(
            config_of((parts[0], folder), tmp_path / "run", data={"cache": "none", "max_quarantine_share": 0.05})
        )


def test_a_damaged_recording_among_those_kept_out_is_set_aside(parts, tmp_path):
    """Without a cache nothing else has heard them when progress is looked at."""
    config = config_of(parts, tmp_path / "run", data={"cache": "none"})
    model, processor = build_model(config.model), build_processor(config.model)
    kept = [example.id for example in prepare_speech(config, model, processor).progress_examples]
    folder = tmp_path / "tones"
    shutil.copytree(parts[1], folder)
    (clip,) = [clip for clip in load_clips(folder) if clip.id == kept[0]]
    clip.audio.write_bytes(clip.audio.read_bytes()[:3000])
    data = {"cache": "none", "max_quarantine_share": 0.05}
    run_training(config_of((parts[0], folder), tmp_path / "run", data=data, evaluate_every=2))
    summary = summary_of(tmp_path / "run")
    assert summary["num_progress_clips"] == len(kept) - 1
    assert summary["quarantined_files"] == {"damaged or truncated": [kept[0]]}


# Tasks


def source(path, task, **options):
    return {"name": str(path), "task": task, **options}


def test_every_task_in_one_run(parts, tmp_path, wavs):
    """Text alone, several recordings, a conversation of several turns, and prompts in turn, in mixed batches."""
    spoken = [{"id": f"s{n}", "audio": wavs(n), "text": "one two", "translation": "eins zwei"} for n in range(8)]
    asked = [
        {"id": f"q{n}", "audio": wavs(n), "text": "three", "question": "Is it three?", "answer": "yes"}
        for n in range(8)
    ]
    texts = [{"id": f"t{n}", "text": "", "prompt": f"say {n}", "response": "four five"} for n in range(8)]
    turns = [
        {"role": "user", "content": "<|audio|>one"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "<|audio|><|audio|>two"},
        {"role": "assistant", "content": "no"},
    ]
    talks = [{"id": f"c{n}", "audio": [wavs(n), wavs(n + 1), wavs(n + 2)], "messages": turns} for n in range(8)]
    sources = [
        source(manifest(tmp_path / "a", spoken), "transcription", prompts="all"),
        source(manifest(tmp_path / "b", spoken), "translation", prompts=["{{ text }} in German:"]),
        source(manifest(tmp_path / "c", asked), "question_answering"),
        source(manifest(tmp_path / "d", texts), "text", prompts=["{{ prompt }}"]),
        source(manifest(tmp_path / "e", talks), "conversation"),
    ]
    config = config_of(
        parts,
        tmp_path / "run",
        steps=10,
        max_batch_tokens=600,
        data={"sources": sources, "speeds": [1.0]},
        tune={"loss_mask": "assistant_turns"},
    )
    run_training(config)
    assert all(loss > 0 for loss in losses(tmp_path / "run"))
    summary = summary_of(tmp_path / "run")
    assert summary["quarantined"] == {}
    assert summary["num_clips"] == 40

    model, processor = build_model(config.model), build_processor(config.model)
    data = prepare_speech(config, model, processor)
    task = TuneTask(model, processor, data, config.stages[0], config.seed)
    prompts, kinds = set(), set()
    for epoch in range(26):
        for index in range(task.order.num_batches(epoch, 0)):
            batch = task.batch(Position(epoch, 0, index))
            kinds.add(frozenset(map(len, batch.audio_tokens)))
            prompts |= {ids.tobytes() for ids, s in zip(batch.input_ids, batch.sources, strict=True) if s == 0}
            assert [sum(map(bool, tokens)) for tokens in batch.audio_tokens] == list(map(len, batch.audio_tokens))
    assert {0, 1, 3} <= set().union(*kinds)
    assert len(prompts) == data.examples[0].prompts.__len__() > 20, "each phrasing comes in turn"
    (only_text,) = [[e for e in data.examples if e.source == 3][:2]]
    alone = task._maker(only_text, from_cache=True).first()
    assert len(alone.lengths) == 0
    assert task.loss(alone).sum.item() > 0, "a batch of texts alone"


def test_a_template_that_names_a_missing_column_is_refused_at_once(parts, tmp_path):
    config = config_of(parts, tmp_path / "run")
    config.data.sources[0].prompts = ["Say it in {{ dialect }}"]
    with pytest.raises(DataError, match=r"dialect.*has not: it has"):
        run_training(config)


def test_rows_without_words_are_set_aside(parts, tmp_path, wavs):
    rows = [{"id": f"r{n}", "audio": wavs(n), "text": f"one two {n}"} for n in range(20)]
    rows[3]["text"], rows[4]["text"] = "", " … "
    path = manifest(tmp_path / "a", rows)
    data = {"sources": [source(path, "transcription")], "max_quarantine_share": 0.2}
    run_training(config_of(parts, tmp_path / "run", data=data))
    assert summary_of(tmp_path / "run")["quarantined"] == {"without text": 2}
    with pytest.raises(DataError, match=r"2 of 20 clips cannot be used .*max_quarantine_share = 0\.01"):
        run_training(config_of(parts, tmp_path / "strict", data={"sources": data["sources"]}))
    manifest(tmp_path / "a", [*rows, {"id": "unheard", "text": "one"}])
    with pytest.raises(DataError, match=r"line 21: the key 'audio' is missing"):
        run_training(config_of(parts, tmp_path / "unheard", data=data))


def test_a_row_that_does_not_fit_its_template_is_named_with_what_did_not(parts, tmp_path, wavs, capsys):
    rows = [{"id": f"r{n}", "audio": wavs(n), "text": f"one two {n}", "lang": "en", "score": n} for n in range(20)]
    sources = [source(manifest(tmp_path / "a", rows), "transcription") | {"prompts": ["{{ 60 // score }} words"]}]
    name = "r0 (the template '{{ 60 // score }} words' fails with score = 0: integer modulo by zero)"
    name = name.replace("integer modulo", "integer division or modulo")
    with pytest.raises(DataError) as caught:
        run_training(config_of(parts, tmp_path / "strict", data={"sources": sources}))
    assert f"the first is {name}: " in str(caught.value)
    data = {"sources": sources, "max_quarantine_share": 0.2}
    run_training(config_of(parts, tmp_path / "run", data=data))
    assert summary_of(tmp_path / "run")["quarantined_files"] == {"with values that do not fit its template": [name]}
    assert f"left out 1 with values that do not fit its template ({name})" in capsys.readouterr().err


def test_a_column_that_is_read_under_our_name_is_called_by_it(parts, tmp_path, wavs):
    rows = [{"id": f"r{n}", "audio": wavs(n), "text": f"one two {n}", "lang": "en"} for n in range(20)]
    given = source(manifest(tmp_path / "a", rows), "transcription")
    data = {"sources": [given | {"prompts": ["In {{ lang }}"]}]}
    with pytest.raises(DataError, match=r"a column 'lang' is read as 'language', so write \{\{ language \}\}$"):
        run_training(config_of(parts, tmp_path / "run", data=data))
    data = {"sources": [given | {"prompts": ["In {{ language }}"]}]}
    run_training(config_of(parts, tmp_path / "run", data=data))
    assert summary_of(tmp_path / "run")["quarantined"] == {}


# Mixtures and sources


def test_weights_are_asked_for_and_kept(parts, tmp_path, wavs, capsys):
    few = [{"id": f"f{n}", "audio": wavs(n), "text": "one"} for n in range(4)]
    many = [{"id": f"m{n}", "audio": wavs(n), "text": "two"} for n in range(4, 28)]
    sources = [
        source(manifest(tmp_path / "few", few), "transcription", weight=1),
        source(manifest(tmp_path / "many", many), "transcription", weight=2),
    ]
    run_training(config_of(parts, tmp_path / "run", steps=30, data={"sources": sources, "speeds": [1.0]}))
    assert "few/rows.jsonl/train/transcription 33." in capsys.readouterr().err.replace("\n", "")
    mixture = summary_of(tmp_path / "run")["stages"][0]["mixture"]
    assert [round(share["requested"], 3) for share in mixture.values()] == [0.333, 0.667]
    for share in mixture.values():
        assert share["realised"] == pytest.approx(share["requested"], abs=0.02)


@pytest.mark.parametrize("weight", [0, -1])
def test_a_weight_of_nothing_is_refused(parts, tmp_path, capsys, weight):
    path = tmp_path / "run.yaml"
    content = config_of(parts, tmp_path / "run").model_dump(mode="json")
    content["data"]["sources"][0]["weight"] = weight
    path.write_text(json.dumps(content))
    assert main(["train", str(path)]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "weight" in error
    assert "expected a number > 0 or null" in error


def test_an_empty_split_is_refused(parts, tmp_path):
    path = manifest(tmp_path / "a", [])
    with pytest.raises(DataError, match="holds no clips"):
        run_training(config_of(parts, tmp_path / "run", data={"sources": [source(path, "transcription")]}))


def test_a_source_that_shrank_is_told_on_resuming(parts, tmp_path, wavs):
    rows = [{"id": f"r{n}", "audio": wavs(n), "text": f"one two {n}"} for n in range(20)]
    path = manifest(tmp_path / "a", rows)
    data = {"sources": [source(path, "transcription")], "speeds": [1.0]}
    run_training(config_of(parts, tmp_path / "run", data=data))
    manifest(tmp_path / "a", rows[:-4])
    with pytest.raises(DataError, match=r"rows\.jsonl.*has shrunk: \d+ clips were recorded, \d+ are there"):
        run_training(config_of(parts, tmp_path / "run", data=data), resume=True)


def test_other_lengths_or_limits_are_another_order(parts, tmp_path):
    config = config_of(parts, tmp_path / "run")
    model, processor = build_model(config.model), build_processor(config.model)
    data = prepare_speech(config, model, processor)
    orders = {
        TuneTask(model, processor, data, config.stages[0].model_copy(update=change), seed).order.fingerprint
        for change, seed in (({}, 1), ({}, 2), ({"max_batch_tokens": 201}, 1))
    }
    assert len(orders) == 3


# The log of samples


def test_a_run_can_be_audited(parts, tmp_path, capsys):
    config = config_of(parts, tmp_path / "run", steps=12, max_batch_tokens=400)
    config.logging.samples = True
    run_training(config)
    assert main(["data", "audit", str(tmp_path / "run"), "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)["stages"].values()
    assert report["ok"]
    assert len(report["epochs"]) > 1
    assert 0 < report["num_ids"] < report["num_records"]
    assert main(["data", "audit", str(tmp_path / "run")]) == 0
    verdict = capsys.readouterr().out.splitlines()[-1]
    epochs = f"epochs 0 to {report['epochs'][-1]}"
    expected = f"over {report['num_ids']} ids in {epochs}, {report['num_records']} places in steps"
    assert verdict.startswith("stage tune: ")
    assert " checks passed" in verdict
    assert verdict.endswith(expected)
    path = tmp_path / "run" / "samples" / "tune" / "samples-rank0.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:2] + lines[3:]) + "\n")
    assert main(["data", "audit", str(tmp_path / "run")]) == 2
    captured = capsys.readouterr()
    assert "the audit failed in stage tune" in captured.err
    assert re.search(r" of 9 checks passed; failed: .*coverage", captured.out)


def test_a_run_without_a_log_of_samples_cannot_be_audited(parts, tmp_path, capsys):
    run_training(config_of(parts, tmp_path / "run", steps=1))
    assert main(["data", "audit", str(tmp_path / "run")]) == 2
    assert "--logging.samples true" in capsys.readouterr().err


def test_a_dry_audit_of_a_config(parts, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(config_of(parts, tmp_path / "run").model_dump(mode="json")))
    words = ["data", "audit", str(path), "--world-sizes", "1", "2", "--workers", "0", "1", "--epochs", "1", "--load"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "coverage" in shown
    assert "FAIL" not in shown
    last = [line for line in shown.splitlines() if line.startswith("stage tune, ranks × workers ")]
    assert [line.split(":")[0].rpartition("workers ")[2] for line in last] == ["1 × 0", "1 × 1", "2 × 0", "2 × 1"]
    for line in last:
        # as far as the step goes in which the epoch ends
        assert re.search(r": all 10 checks passed; over 29 ids in epochs 0 to 1, \d+ places in steps$", line)


def test_ranks_need_evenly_many_batches(parts, tmp_path):
    from ultravox.data.loader import Loader

    config = config_of(parts, tmp_path / "run")
    model, processor = build_model(config.model), build_processor(config.model)
    task = TuneTask(model, processor, prepare_speech(config, model, processor), config.stages[0], 1)
    with pytest.raises(ConfigError, match="multiple of 3"):
        Loader(task.order, task.make_batch, batches_per_step=2, world_size=3)


def test_other_rates_and_channels_train_as_one(parts, tmp_path, wavs):
    """Stereo at 44.1 kHz under a row that says nothing of it."""
    import numpy as np

    rows = []
    for number in range(12):
        waveform, rate = soundfile.read(wavs(number), dtype="float32")
        wide = np.repeat(np.stack([waveform, waveform], axis=1), 2, axis=0)
        path = tmp_path / f"{number}.wav"
        soundfile.write(path, wide, 2 * rate)
        rows.append({"id": str(number), "audio": str(path), "text": f"one two {number}"})
    data = {"sources": [source(manifest(tmp_path / "a", rows), "transcription")], "cache": "none", "speeds": [1.0]}
    config = config_of(parts, tmp_path / "run", data=data)
    model, processor = build_model(config.model), build_processor(config.model)
    task = TuneTask(model, processor, prepare_speech(config, model, processor), config.stages[0], 1)
    batch = task.batch()
    for seconds, tokens in zip(batch.seconds, batch.audio_tokens, strict=True):
        assert tokens == [len(range(0, round(seconds * 50), 3))]
