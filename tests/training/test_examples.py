"""Examples that are made when a batch asks for them: the same as if all were kept, in little memory."""

import json
import pickle

import numpy as np
import pytest
from tiny_run import save_tiny_models, save_tones, tiny_config

from ultravox.cli.main import main
from ultravox.data.prepared_clips import PreparedClips
from ultravox.data.quarantine import Quarantine
from ultravox.model.factory import build_model, build_processor
from ultravox.training import examples as of_examples
from ultravox.training import rows as of_rows
from ultravox.training.align import AlignTask
from ultravox.training.examples import ExampleTable, KeptExamples, Prompts, lengths_of
from ultravox.training.run import run_training
from ultravox.training.speech import prepare_speech
from ultravox.training.tune import TuneTask


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    return save_tiny_models(folder), save_tones(folder / "tones", 40)


def losses(run_dir):
    rows = map(json.loads, (run_dir / "log.jsonl").read_text().splitlines())
    return [(row["stage"], row["step"], row["loss"]) for row in rows if "loss" in row]


def short(parts, run_dir, **data):
    config = tiny_config(*parts, run_dir)
    for stage in config.stages:
        stage.max_steps = 5
        stage.optim.warmup_steps = 1
    for name, value in data.items():
        setattr(config.data, name, value)
    return config


@pytest.fixture(scope="module")
def whole(parts, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    run_training(short(parts, run_dir))
    return losses(run_dir)


def test_a_run_that_keeps_two_examples_is_the_run_that_keeps_all(parts, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(of_examples, "KEPT_EXAMPLES", 2)
    monkeypatch.setattr(of_rows, "CHUNK_ROWS", 3)
    monkeypatch.setattr(of_rows, "MANY_ROWS", 5)
    run_training(short(parts, tmp_path / "run"))
    assert losses(tmp_path / "run") == whole


@pytest.mark.parametrize("cache", ["auto", "none"])
def test_a_table_says_of_its_examples_what_they_are(parts, tmp_path, cache):
    config = short(parts, tmp_path / "run", cache=cache)
    config.data.sources[0].prompts = "all"
    processor, model = build_processor(config.model), build_model(config.model)
    data = prepare_speech(config, model, processor)
    made = lengths_of(list(data.examples), config.model.stack_factor)
    for name in ("text_tokens", "ctc_tokens", "audio_tokens", "exists", "one_window", "seconds", "num_recordings"):
        mine = getattr(data.examples.lengths, name)
        np.testing.assert_array_equal(mine, getattr(made, name), err_msg=name)
        assert mine.dtype == getattr(made, name).dtype
    assert made.exists.all()
    assert made.ctc_tokens.min() > 0
    assert data.examples.sources.tolist() == [example.source for example in data.examples]
    rows = np.flatnonzero(data.examples.sources == 1)[::2]
    assert [e.uid for e in data.examples.subset(rows)] == [data.examples[int(row)].uid for row in rows]
    align, tune = (
        kind(model, processor, data, stage, 0) for kind, stage in zip((AlignTask, TuneTask), config.stages, strict=True)
    )
    transcripts = np.concatenate([example.transcript for example in align.examples])
    assert set(transcripts.tolist()) <= set(np.concatenate(data.vocabularies).tolist())
    assert len(tune.examples) == len(data.examples)


def test_a_prepared_corpus_is_not_held_in_memory(parts, whole, tmp_path):
    """Its rows are read again, from the same bytes: the run is that of the files that it was prepared from."""
    folder = tmp_path / "prepared"
    assert main(["data", "prepare", str(parts[1]), "--output", str(folder)]) == 0
    config = short(parts, tmp_path / "run")
    for source in config.data.sources:
        source.name = str(folder)
    run_training(config)
    assert losses(tmp_path / "run") == whole
    processor, model = build_processor(config.model), build_model(config.model)
    data = prepare_speech(config, model, processor)
    config = short(parts, tmp_path / "other")
    plain = prepare_speech(config, model, processor)
    assert [e.id for e in data.examples] == [e.id for e in plain.examples]
    assert (data.examples.lengths.text_tokens == plain.examples.lengths.text_tokens).all()
    assert (data.examples.lengths.audio_tokens == plain.examples.lengths.audio_tokens).all()
    for mine, theirs in zip(data.examples, plain.examples, strict=True):
        assert [ids.tolist() for ids, _ in mine.prompts] == [ids.tolist() for ids, _ in theirs.prompts]


@pytest.mark.parametrize("seconds", [(0.0, 100.0), (50.0, 60.0)])
def test_what_is_kept_out_is_found_in_one_pass(parts, tmp_path, monkeypatch, seconds):
    """Whether clips of the wanted length are there or not, no row is looked up but those that are chosen."""
    folder = tmp_path / "prepared"
    assert main(["data", "prepare", str(parts[1]), "--output", str(folder)]) == 0
    config = short(parts, tmp_path / "run")
    config.data.sources = config.data.sources[:1]
    config.data.sources[0].name = str(folder)
    sources, _ = of_rows.read_sources(config, build_processor(config.model), Quarantine())
    looked_up = []
    inner = PreparedClips.__getitem__
    monkeypatch.setattr(PreparedClips, "__getitem__", lambda self, row: looked_up.append(row) or inner(self, row))
    monkeypatch.setattr(of_rows, "PROGRESS_SECONDS", seconds)
    progress, (training,) = of_rows.keep_out(sources, 3)
    assert len(progress) == len(looked_up) == 3
    assert len(training) == 37
    ids = {sources[0].clips[int(row)].id for row in training}
    assert not ids & {clip.id for _, clip in progress}


def test_no_row_is_lost_uncounted(parts, tmp_path):
    """Each row is trained on, kept out, or has the text of one that is; the run says how many of each there are."""
    config = short(parts, tmp_path / "run")
    config.data.sources[1].max_clips = None
    processor, model = build_processor(config.model), build_model(config.model)
    data = prepare_speech(config, model, processor)
    assert data.num_same_text == 3, "both sources are the same tones"
    assert len(data.examples) + len(data.progress_examples) + data.num_same_text == data.num_rows == 80
    said = f'kept out 3 clips for "WER so far" and {data.num_same_text} rows with their texts'
    assert said in data.describe()


def test_kept_examples_have_one_place_each(monkeypatch):
    monkeypatch.setattr(of_examples, "KEPT_EXAMPLES", 3)
    made = []
    kept = KeptExamples(lambda number: made.append(number) or number)
    assert [kept(number) for number in (0, 1, 2, 0, 1, 3, 3, 0)] == [0, 1, 2, 0, 1, 3, 3, 0]
    assert made == [0, 1, 2, 3, 0]


def test_prompts_are_made_once_and_travel_whole():
    made = []
    prompts = Prompts(3, lambda number: made.append(number) or (number, number))
    assert len(prompts) == 3
    assert prompts[1] == prompts[1] == (1, 1)
    assert made == [1]
    assert pickle.loads(pickle.dumps(prompts)) == [(0, 0), (1, 1), (2, 2)]
    with pytest.raises(IndexError):
        prompts[3]


def test_a_table_of_nothing():
    table = ExampleTable.of([], 5)
    assert len(table) == 0
    assert list(table) == []
    assert table.lengths.text_tokens.shape[0] == 0
