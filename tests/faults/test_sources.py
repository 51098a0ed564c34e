"""Sources that cannot be mixed, have shrunk or are empty, templates without their column, and too many faults."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faulty_runs import config_for, one_line, set_aside, summary_of, write_rows, write_shards, written

from ultravox.cli.main import main
from ultravox.config.schema import RunConfig
from ultravox.data.manifest import write_dataset
from ultravox.data.sources import load_clips
from ultravox.errors import CheckpointError, DataError
from ultravox.training.run import run_training


@pytest.mark.parametrize("command", [["train"], ["data", "audit"], ["data", "cache", "build"]])
@pytest.mark.parametrize(
    ("key", "value"),
    [("weight", "0"), ("weight", "-1"), ("weight", ".nan"), ("weight", ".inf"), ("repeat", "0"), ("repeat", "-2")],
)
def test_a_share_of_nothing_is_refused_before_anything_runs(parts, rows, tmp_path, command, key, value, capsys):
    """A mixture weight, or a number of repeats, of 0, below it or beyond all numbers: key and bound are named."""
    source = write_rows(tmp_path / "set.jsonl", rows)
    content = config_for(parts, source, tmp_path / "run").model_dump(mode="json")
    content["data"]["sources"] *= 2
    content["data"]["sources"][1] = {**content["data"]["sources"][0], key: "@"}
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(content).replace('"@"', value))
    error = one_line([*command, path], capsys)
    assert key in error
    assert "run.yaml" in error
    assert not (tmp_path / "run").exists()


def test_weights_of_some_sources_alone_are_refused(parts, rows, tmp_path, capsys):
    """A source without a weight beside one that has one would have no share."""
    sources = [{"name": str(write_rows(tmp_path / f"{n}.jsonl", rows[16 * n : 16 * n + 16]))} for n in range(2)]
    content = config_for(parts, tmp_path / "0.jsonl", tmp_path / "run").model_dump(mode="json")
    content["data"]["sources"] = [{**sources[0], "weight": 1}, sources[1]]
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(content))
    assert "weight" in one_line(["train", path], capsys)


def write(folder, kind, rows):
    """Rows as a source of a kind, in the place of what was there."""
    place = folder / "set"
    if kind == "manifest":
        return write_rows(folder / "set.jsonl", rows)
    if kind == "prepared":
        words = ["data", "prepare", str(write_rows(folder / "train.jsonl", rows)), "--overwrite"]
        assert main([*words, "--output", str(place)]) == 0
        return place
    shutil.rmtree(place, ignore_errors=True)
    if kind != "dataset":
        return write_shards(place, rows)
    (place / "audio").mkdir(parents=True)
    moved = [{**row, "audio": shutil.copy(row["audio"], place / "audio")} for row in rows]
    clips = load_clips(write_rows(folder / "all.jsonl", [{**row, "audio": str(row["audio"])} for row in moved]))
    write_dataset(place, name="set", licence="CC0", attribution="", splits={"train": clips})
    return place


@pytest.mark.parametrize("kind", ["manifest", "dataset", "parquet", "stream", "prepared"])
def test_a_source_that_shrank_is_told_on_resuming(parts, rows, tmp_path, kind):
    """Fewer clips than when the run began: refused by name, and the checkpoints stay as they are."""
    streaming = kind == "stream"
    config = config_for(parts, write(tmp_path, kind, rows), tmp_path / "run", streaming=streaming)
    run_training(config)
    write(tmp_path, kind, rows[:-8])
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    message = (
        r"the training data differs: .*set" if streaming else r"has shrunk: \d+ clips were recorded, \d+ are there"
    )
    with pytest.raises((DataError, CheckpointError), match=message):
        run_training(config, resume=True)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == left


def empty(folder, kind):
    """A source of each kind whose split has no row."""
    folder.mkdir()
    if kind == "manifest":
        return write_rows(folder / "set.jsonl", [])
    if kind == "audio folder":
        (folder / "metadata.csv").write_text("file_name,text\n")
    elif kind == "dataset":
        write_dataset(folder, name="set", licence="CC0", attribution="", splits={"train": []})
    else:
        pq.write_table(pa.table({"id": pa.array([], pa.string())}), folder / "train-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize("kind", ["manifest", "audio folder", "dataset", "parquet", "stream"])
def test_an_empty_split_is_refused_by_every_command(parts, tmp_path, kind, capsys):
    """No rows: one line that names the source, from training, preparing and inspecting."""
    source = empty(tmp_path / "set", kind)
    config = config_for(parts, source, tmp_path / "run", streaming=kind == "stream")
    error = one_line(["train", written(tmp_path / "run.yaml", config)], capsys)
    assert str(source) in error
    assert "holds no clips" in error
    assert not (tmp_path / "run" / "config.yaml").exists()
    if kind != "stream":
        assert "holds no" in one_line(["data", "inspect", source], capsys)
        assert "holds no" in one_line(["data", "prepare", source, "--output", tmp_path / "out"], capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["prompts", "response"])
@pytest.mark.parametrize(
    ("command", "streaming"),
    [(["train"], False), (["train"], True), (["data", "audit"], False), (["data", "cache", "build"], False)],
)
def test_a_template_that_names_a_missing_column_is_refused(parts, rows, tmp_path, part, streaming, command, capsys):
    """The column, the template and the columns that there are, before anything is encoded."""
    source = write_shards(tmp_path / "set", rows) if streaming else write_rows(tmp_path / "set.jsonl", rows)
    template = "Say it in {{ dialect }}"
    options = {part: [template] if part == "prompts" else template}
    config = config_for(parts, source, tmp_path / "run", streaming=streaming, source=options)
    error = one_line([*command, written(tmp_path / "run.yaml", config)], capsys)
    assert f"the template {template!r}" in error
    assert "needs the column 'dialect'" in error
    assert "it has answer, " in error
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize("num_faults", [1, 2])
def test_more_than_one_in_a_hundred_ends_a_run_by_default(parts, rows, tmp_path, num_faults, capsys):
    """The threshold is 1% of the rows: one of a hundred trains, two of a hundred do not, by any command."""
    many = [{**row, "id": f"{turn}-{row['id']}"} for turn in range(4) for row in rows][:100]
    for row in many[50 : 50 + num_faults]:
        row["text"] = None
        row["answer"] = None
    source = write_rows(tmp_path / "set.jsonl", many)
    train = ["train", written(tmp_path / "run.yaml", config_for(parts, source, tmp_path / "run"))]
    prepare = ["data", "prepare", source, "--output", tmp_path / "out"]
    if num_faults == 1:
        assert [main([str(word) for word in words]) for words in (train, prepare)] == [0, 0]
        assert set_aside(tmp_path / "run") == {"without text": ["1-tone-018"]}
        return
    for words, option in ((train, "data.max_quarantine_share"), (prepare, "--max-quarantine-share")):
        error = one_line(words, capsys)
        assert f"2 of 100 clips cannot be used (2 without text), more than {option} = 0.01 allows" in error
    assert not (tmp_path / "run" / "train.json").exists()
    assert not (tmp_path / "out").exists()


def test_what_is_prepared_already_is_judged_again(rows, tmp_path, capsys):
    """The threshold holds for the command, not only for the run that built the dataset."""
    source = write_rows(tmp_path / "train.jsonl", [*rows, {**rows[0], "id": "mute", "text": " ", "answer": None}])
    words = ["data", "prepare", str(source), "--output", str(tmp_path / "out")]
    assert main([*words, "--max-quarantine-share", "0.1"]) == 0
    assert "1 of 33 clips cannot be used (1 without text)" in one_line(words, capsys)
    assert main([*words, "--max-quarantine-share", "0.1"]) == 0
    assert "it was there already" in capsys.readouterr().out


def test_a_stream_of_faults_ends_as_soon_as_they_are_too_many(parts, rows, tmp_path):
    """Of a stream's first thousand rows more than ten are bad: no need to see the thousand."""
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFFnonsense")
    many = [{**row, "id": f"{turn}-{row['id']}"} for turn in range(8) for row in rows]
    for row in many[::4]:
        row["audio"] = str(broken)
    source = write_shards(tmp_path / "set", many)
    with pytest.raises(DataError, match=r"1\d of \d{2} clips cannot be used \(1\d .*max_quarantine_share = 0\.01"):
        run_training(config_for(parts, source, tmp_path / "run", streaming=True, steps=8))


def test_a_stream_of_a_few_faults_is_judged_at_the_end_of_its_epoch(parts, rows, tmp_path):
    """Two bad rows of sixty-four: too few to judge at once, too many for the epoch."""
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFFnonsense")
    many = [{**row, "id": f"{turn}-{row['id']}"} for turn in range(2) for row in rows]
    for row in many[::32]:
        row["audio"] = str(broken)
    source = write_shards(tmp_path / "set", many)
    config = config_for(parts, source, tmp_path / "run", streaming=True, steps=30)
    with pytest.raises(DataError, match=r"2 of \d\d clips cannot be used"):
        run_training(config)
    content = config.model_dump(mode="json")
    content["data"]["max_quarantine_share"] = 0.05
    run = run_training(RunConfig.model_validate(content | {"run_dir": str(tmp_path / "loose")}))
    assert sum(summary_of(run)["quarantined"].values()) == 2
