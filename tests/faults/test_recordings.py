"""Cases 16 to 20: recordings that are broken, empty, silent, endless or of another rate, on every way they come in."""

import json
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
from faulty_runs import (
    config_for,
    cut,
    losses_of,
    of_a_three_hour_header,
    of_rate,
    of_samples,
    of_unknown_length,
    one_line,
    set_aside,
    summary_of,
    tone,
    with_a_bad_sample,
    write_rows,
    write_shards,
)

from ultravox.audio.waveform import audio_seconds, load_waveform
from ultravox.cli.main import main
from ultravox.data.prepared import iter_prepared
from ultravox.data.source import SourceSpec
from ultravox.data.sources import load_source, open_source
from ultravox.errors import AudioError
from ultravox.model.factory import build_model, build_processor
from ultravox.training.run import run_training
from ultravox.training.speech import prepare_speech
from ultravox.training.tune import TuneTask

#: Reason → the recordings that are set aside for it, each called as its file.
EXPECTED = {
    "damaged or truncated": ["cut-flac", "cut-wav"],
    "with NaN or infinite samples": ["infinite", "nan"],
    "without samples": ["zero"],
    "not readable as audio": ["rate-7"],
    "too short": ["one-sample"],
    "too long": ["hours"],
}
NUM_FAULTS = 6  # too short and too long are asked for


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Rows whose durations lie, so that nothing but the audio tells; the silent and the endless one can be used."""
    folder = tmp_path_factory.mktemp("broken")
    files = [
        cut(folder / "cut-wav.wav"),
        cut(folder / "cut-flac.flac"),
        with_a_bad_sample(folder / "nan.wav", np.nan),
        with_a_bad_sample(folder / "infinite.wav", np.inf),
        of_samples(folder / "zero.wav", tone(0)),
        of_samples(folder / "one-sample.wav", tone(1)[:1]),
        of_samples(folder / "silent.wav", 0 * tone(0.6)),
        of_a_three_hour_header(folder / "hours.flac"),
        of_rate(folder / "rate-7.wav", 7),
        of_unknown_length(folder / "piped.flac"),
    ]
    return [{"id": path.stem, "audio": str(path), "text": f"one {path.stem}", "duration": 0.6} for path in files]


@pytest.mark.parametrize("way", ["cached", "decoded", "decoded by workers", "streamed"])
def test_training_sets_each_aside_by_its_reason(parts, rows, broken, tmp_path, way):
    """Cases 16 to 20 in one run: what is left trains, and every loss is a number."""
    streaming = way == "streamed"
    mixed = [row for pair in zip(rows, broken, strict=False) for row in pair] + rows[len(broken) :]
    source = write_shards(tmp_path / "set", mixed) if streaming else write_rows(tmp_path / "set.jsonl", mixed)
    changes = {
        "cache": "auto" if way == "cached" else "none",
        "loader": {"workers": 2 if "workers" in way else 0},
        "max_quarantine_share": NUM_FAULTS / len(mixed),
    }
    run = run_training(config_for(parts, source, tmp_path / "run", steps=14, streaming=streaming, **changes))
    assert set_aside(run) == EXPECTED
    assert summary_of(run)["stages"][0]["skipped_steps"] == 0
    assert all(math.isfinite(loss) for loss in losses_of(run))
    changes["max_quarantine_share"] -= 1e-6
    config = config_for(parts, source, tmp_path / "strict", steps=14, streaming=streaming, **changes)
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(config.model_dump(mode="json")))
    assert main(["train", str(path)]) == 2


@pytest.mark.parametrize("told", [True, False], ids=["lengths told", "lengths read from headers"])
def test_preparing_and_inspecting_name_each(broken, rows, tmp_path, capsys, told):
    """Cases 16 to 20: left out of a prepared dataset, found by an inspection."""
    if not told:
        broken = [{key: value for key, value in row.items() if key != "duration"} for row in broken]
    source, out = write_rows(tmp_path / "train.jsonl", [*rows, *broken]), tmp_path / "out"
    assert main(["data", "prepare", str(source), "--output", str(out), "--max-quarantine-share", "0.5"]) == 0
    left_out = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    bad = {row["id"] for row in broken} - {"piped"}
    if not told:
        bad |= {"piped"}  # nothing tells its length beforehand
    assert {row["id"] for row in left_out} == bad
    reasons = {row["id"]: row["reason"] for row in left_out}
    if told:
        assert reasons == {name: why for why, names in EXPECTED.items() for name in names} | {"silent": "silent"}
    assert (reasons["one-sample"], reasons["hours"], reasons["silent"]) == ("too short", "too long", "silent")
    assert all(row["detail"] for row in left_out)
    assert len(list(iter_prepared(out, "train"))) == len(rows) + told

    capsys.readouterr()
    assert main(["data", "inspect", str(source), "--json", "--strict"]) == 2
    findings = json.loads(capsys.readouterr().out)["findings"]
    found = {finding["id"] for finding in findings if finding["kind"] in ("unreadable", "unusable")}
    assert found == bad - {"silent", "one-sample"}
    assert ("silent", "silent") in {(finding["kind"], finding["id"]) for finding in findings}


def test_zero_samples_are_a_fault_wherever_the_length_comes_from(tmp_path):
    """Case 18: a header that declares no samples is no short clip, which the configuration would ask to leave out."""
    path = of_samples(tmp_path / "zero.wav", tone(0))
    with pytest.raises(AudioError, match="no audio samples"):
        audio_seconds(path)
    source = write_rows(tmp_path / "a.jsonl", [{"id": "zero", "audio": str(path), "text": "one"}] * 2)
    rows = [row for _, row in open_source(SourceSpec(str(source))).rows()]
    assert [row.reason for row in rows] == ["damaged audio"] * 2


# Case 18


def hubert_folder(folder: Path) -> Path:
    """A random HuBERT, whose first frame needs 400 samples."""
    import torch
    from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    HubertModel(HubertConfig(**small, conv_dim=(16,) * 7, num_conv_pos_embedding_groups=2)).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("cache", ["auto", "none"])
@pytest.mark.parametrize("encoder", ["whisper", "hubert"])
def test_no_clip_is_too_short_for_its_encoder(parts, rows, tmp_path, encoder, cache):
    """Case 18: with every length allowed, a clip of no frame is set aside, and no attention has a length of zero."""
    clips = {"one": tone(1)[:1], "less": tone(0.02), "more": tone(0.1), "silent": 0 * tone(0.5)}
    files = [of_samples(tmp_path / f"{name}.wav", samples) for name, samples in clips.items()]
    short = [{"id": path.stem, "audio": str(path), "text": f"one {path.stem}"} for path in files]
    lying = [{**row, "id": f"{row['id']}-lying", "duration": 0.5} for row in short]
    source = write_rows(tmp_path / "set.jsonl", [*rows[:6], *short, *lying])
    model = {"audio_encoder": str(hubert_folder(tmp_path / "hubert"))} if encoder == "hubert" else {}
    changes = {"min_audio_seconds": 0, "speeds": [1.0, 1.3], "cache": cache, "model": model}
    run = run_training(config_for(parts, source, tmp_path / "run", steps=8, **changes))
    names = {Path(name).name for names in summary_of(run)["quarantined_files"].values() for name in names}
    if encoder == "whisper":
        assert names == set(), "it makes frames of a single sample"
    else:
        assert list(summary_of(run)["quarantined_files"]) == ["too short"]
        assert {name.partition(".")[0].removesuffix("-lying") for name in names} == {"one", "less"}
        assert len(names) == 4
    assert all(math.isfinite(loss) for loss in losses_of(run))


@pytest.mark.parametrize("encoder", ["whisper", "hubert"])
def test_batches_of_silence_alone_have_a_loss(parts, tmp_path, encoder):
    """Case 18: normalised features of all-silent clips are numbers, with and without augmentation."""
    files = [of_samples(tmp_path / f"{n}.wav", 0 * tone(0.5 + 0.1 * n)) for n in range(4)]
    silent = [{"id": path.stem, "audio": str(path), "text": "one two"} for path in files]
    source = write_rows(tmp_path / "set.jsonl", silent)
    model = {"audio_encoder": str(hubert_folder(tmp_path / "hubert"))} if encoder == "hubert" else {}
    noise = {"augment": {"waveform": {"noise_share": 1.0, "gain_db": 6, "reverb_share": 0.5}}}
    for name, stage in (("plain", {}), ("augmented", noise)):
        run = run_training(config_for(parts, source, tmp_path / name, steps=3, model=model, stage=stage))
        assert summary_of(run)["stages"][0]["skipped_steps"] == 0
        assert all(loss is not None and 0 < loss < 100 for loss in losses_of(run))


# Case 19


def peak_megabytes(function) -> float:
    """What Python and NumPy held at the most while a function ran."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


HOURS_MEGABYTES = 3 * 3600 * 16000 * 4 / 1e6  # 691, decoded


@pytest.fixture
def hours(tmp_path, write_three_hours, monkeypatch):
    """Three rows on a whole file of three hours: one that tells, one that lies, one that names most of it."""
    path = tmp_path / "hours.wav"
    write_three_hours(path)
    read = soundfile.SoundFile.read

    def guarded(sound, *args, **options):
        assert sound.frames < 3600 * sound.samplerate, "decoded before the check"
        return read(sound, *args, **options)

    monkeypatch.setattr(soundfile.SoundFile, "read", guarded)
    row = {"audio": str(path), "text": "one two"}
    part = {"offset": 5, "duration": 10_000}
    return [{"id": "told", **row}, {"id": "lying", **row, "duration": 0.5}, {"id": "part", **row, **part}]


@pytest.mark.parametrize("cache", ["auto", "none"])
def test_training_refuses_three_hours_unread(parts, rows, hours, tmp_path, cache):
    """Case 19: from the header, before a sample is decoded, and in little memory."""
    source = write_rows(tmp_path / "set.jsonl", [*rows, *hours])
    config = config_for(parts, source, tmp_path / "run", steps=10, cache=cache)
    peak = peak_megabytes(lambda: run_training(config))
    assert peak < 60 < HOURS_MEGABYTES / 10
    assert list(summary_of(tmp_path / "run")["quarantined"].items()) == [("too long", 3)]


def test_preparing_and_inspecting_refuse_three_hours_unread(rows, hours, tmp_path, capsys):
    """Case 19, also of a part of a recording, which is decoded to be read."""
    source, out = write_rows(tmp_path / "train.jsonl", [*rows, *hours]), tmp_path / "out"
    words = ["data", "prepare", str(source), "--output", str(out), "--workers", "1"]
    assert peak_megabytes(lambda: main(words)) < 60
    left_out = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert {(row["id"], row["reason"]) for row in left_out} == {(row["id"], "too long") for row in hours}
    capsys.readouterr()
    assert peak_megabytes(lambda: main(["data", "inspect", str(source), "--json"])) < 60
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert {finding["id"] for finding in findings if finding["kind"] == "unreadable"} == {"told", "lying", "part"}


# Case 20


@pytest.mark.parametrize("cache", ["auto", "none"])
def test_other_rates_and_channels_train_as_one(parts, tmp_path, cache):
    """Case 20: rates from 8 to 48 kHz, one or two channels: as many positions as the seconds give, by any way."""
    rows = []
    for number, (rate, channels) in enumerate([(8000, 2), (16000, 1), (22050, 1), (44100, 2), (48000, 1)]):
        path = tmp_path / f"{number}.wav"
        soundfile.write(path, np.stack([tone(0.6, rate)] * channels, axis=1), rate)
        rows.append({"id": str(number), "audio": str(path), "text": f"one two {number}"})
    config = config_for(parts, write_rows(tmp_path / "set.jsonl", rows), tmp_path / "run", cache=cache)
    model, processor = build_model(config.model), build_processor(config.model)
    data = prepare_speech(config, model, processor)
    batch = TuneTask(model, processor, data, config.stages[0], 1).batch()
    assert len(batch.ids) == 5
    assert {tuple(tokens) for tokens in batch.audio_tokens} == {(10,)}, "0.6 s at 50 frames a second, three at a time"


def test_two_channels_are_mixed_not_chosen(tmp_path):
    """Case 20: what one channel alone says is heard."""
    soundfile.write(tmp_path / "a.wav", np.stack([tone(0.5), 0 * tone(0.5)], axis=1), 16000, subtype="FLOAT")
    np.testing.assert_allclose(load_waveform(tmp_path / "a.wav"), tone(0.5) / 2, atol=1e-6)


@pytest.mark.parametrize("rate", [0, 1999, 400_000])
def test_a_rate_that_cannot_be_is_an_error(parts, rows, tmp_path, rate, capsys):
    """Case 20: set aside, so that more than 1% of such files end a run."""
    bad = {"id": "bad", "audio": str(of_rate(tmp_path / "bad.wav", rate)), "text": "one", "duration": 0.6}
    source = write_rows(tmp_path / "set.jsonl", [*rows, bad])
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(config_for(parts, source, tmp_path / "run").model_dump(mode="json")))
    assert main(["train", str(config)]) == 2
    assert "1 of 33 clips cannot be used" in capsys.readouterr().err
    assert "bad.wav" in one_line(["data", "prepare", source, "--output", tmp_path / "out"], capsys)


def test_a_rate_that_lies_within_reason_is_a_doubt(tmp_path, capsys):
    """Case 20: twice the true rate is half the true length, which only the row can tell."""
    path = of_rate(tmp_path / "fast.wav", 32000)
    source = write_rows(tmp_path / "a.jsonl", [{"id": "fast", "audio": str(path), "text": "one", "duration": 0.6}])
    assert main(["data", "inspect", str(source), "--json"]) == 0
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert (finding["kind"], finding["detail"]) == ("wrong duration", "0.60 s in the row, 0.30 s of audio")


def test_a_length_that_a_pipe_left_open_is_decoded_to_the_end(tmp_path):
    """Case 20's kin: a header that does not know is no header of years; the limit holds while decoding."""
    path = of_unknown_length(tmp_path / "piped.flac")
    assert len(load_waveform(path)) == 9600
    with pytest.raises(AudioError, match="at most 0 s"):
        load_waveform(path, max_seconds=0.5)
    row = {"id": "piped", "audio": str(path), "text": "one"}
    assert load_source(SourceSpec(str(write_rows(tmp_path / "a.jsonl", [{**row, "duration": 0.6}])))).clips
