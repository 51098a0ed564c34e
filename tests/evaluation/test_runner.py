"""The evaluation as a whole, on a fake model: the numbers, the controls, the schema, the files."""

import json

import pytest

from ultravox.errors import CheckpointError, ConfigError, DataError
from ultravox.evaluation.checkpoint import find_checkpoint, identity
from ultravox.evaluation.runner import Settings, default_output, evaluate, evenly_spread
from ultravox.evaluation.system import System, in_batches
from ultravox.metrics.error_rate import word_errors


def test_results(run_folder, dataset, questions, listening_system):
    results, folder = evaluate(
        run_folder,
        str(dataset),
        settings=Settings(batch_size=3, questions=str(questions), num_bootstrap=200),
        system=listening_system,
        command="ultravox evaluate runs/tiny",
    )
    assert folder == run_folder
    assert results["left_out"] == []
    assert json.loads((run_folder / "results.json").read_text()) == results
    predictions = [json.loads(line) for line in (run_folder / "predictions.jsonl").read_text().splitlines()]
    clips = [row for row in predictions if row["kind"] == "transcription"]
    assert len(clips) == 8

    # the figures are those of the raw texts in predictions.jsonl
    references = [row["reference"] for row in clips]
    assert results["wer"]["counts"] == word_errors(references, [row["hypothesis"] for row in clips]).as_dict()
    assert results["wer"]["counts"]["substitutions"] == 3  # the fake hears "a" for "the"
    assert results["wer"]["n"] == 8
    assert results["wer"]["num_words"] == sum(row["num_words"] for row in clips)
    low, high = results["wer"]["interval"]
    assert low <= results["wer"]["value"] <= high
    assert 0 < results["cer"]["value"] < results["wer"]["value"]

    controls = results["controls"]
    assert controls["silence"]["wer"] == 1.0
    assert controls["swapped"]["wer"] == word_errors(references, [row["swapped_hypothesis"] for row in clips]).rate
    assert all(row["swapped_id"] != row["id"] for row in clips)
    assert results["audio_use"]["verdict"] == "PASS"
    assert results["audio_use"]["difference"]["interval"][0] > 0

    assert results["bounds"]["text"]["wer"] == 0.0
    assert results["bounds"]["cascade"]["wer"] == 0.0
    assert results["bounds"]["cascade"]["method"]

    answers = results["answers"]
    assert (answers["share"], answers["n"], answers["swapped_share"]) == (1.0, 4, 0.0)
    assert answers["rule"]
    assert (answers["text"]["share"], answers["echo"]["share"]) == (0.0, 0.0)  # the fake only repeats the question
    asked = [row for row in predictions if row["kind"] == "answer"]
    assert asked[0]["text"] == "what is the capital of france"
    assert asked[0]["text_answer"] == "what is the capital of france, you ask"
    assert asked[0]["answer"] == asked[0]["reference"] == "The capital of France is Paris."
    assert [row["equal"] for row in asked] == [True] * 4
    assert all(row["swapped_answer"] != row["reference"] for row in asked)

    assert results["version"] == 1
    assert results["train_seconds"] == 12.5
    assert results["peak_memory_bytes"] == 123456789
    assert results["evaluation_seconds"] > 0
    assert results["normaliser"]["version"]
    assert len(results["checkpoint"]["sha256"]) == 64
    assert results["generation"] == {
        "decoding": "greedy",
        "batch_size": 3,
        "max_new_tokens": 64,
        "transcript_limit": {"extra_tokens": 4, "tokens_per_second": 6.0},
        "prompt": "<|audio|>Transcribe",
    }
    assert results["batch_invariance"] == {"n": 8, "equal": 8}


def test_a_model_that_does_not_listen_fails(run_folder, dataset, deaf_system):
    results, _ = evaluate(run_folder, str(dataset), system=deaf_system)
    assert results["audio_use"]["verdict"] == "FAIL"
    assert results["controls"]["swapped"]["wer"] == pytest.approx(results["wer"]["value"])


def test_what_is_absent_is_null_and_says_why(run_folder, dataset, deaf_system):
    deaf_system.absent["recognise"] = "its encoder is no Whisper"
    results, _ = evaluate(run_folder, str(dataset), system=deaf_system)
    cascade = results["bounds"]["cascade"]
    assert (cascade["wer"], cascade["interval"], cascade["absent"]) == (None, None, "its encoder is no Whisper")
    assert results["answers"]["share"] is results["answers"]["swapped"]["share"] is None


def test_fast_leaves_bounds_out(run_folder, dataset, listening_system):
    results, _ = evaluate(run_folder, str(dataset), settings=Settings(fast=True), system=listening_system)
    assert results["fast"] is True
    assert results["bounds"]["text"]["absent"] == "left out by --fast"
    assert results["controls"]["swapped"]["wer"] > 0.9


def test_limit_spreads_over_the_split(run_folder, dataset, listening_system):
    results, _ = evaluate(run_folder, str(dataset), settings=Settings(limit=3), system=listening_system)
    assert results["wer"]["n"] == 3
    assert results["data"] | {"source": "", "seconds": 0} == {
        "source": "", "split": "heldout", "num_clips": 3, "split_clips": 8, "limit": 3, "seconds": 0,
        "stand_in": False,
    }  # fmt: skip
    assert [clip for clip in evenly_spread(list(range(9)), 3)] == [0, 4, 8]
    assert results["bounds"]["text"]["wer"] == 0.0


def test_no_figure_without_an_interval():
    with pytest.raises(ConfigError, match="at least 1"):
        Settings(num_bootstrap=0)


def test_one_clip_cannot_be_swapped(run_folder, dataset, listening_system):
    results, _ = evaluate(run_folder, str(dataset), settings=Settings(limit=1), system=listening_system)
    assert results["controls"]["swapped"]["wer"] is None
    assert results["audio_use"]["verdict"] == "UNKNOWN"


def test_questions_without_answers_are_an_error(run_folder, dataset, listening_system):
    with pytest.raises(DataError, match="clip0 has no answer"):
        evaluate(run_folder, str(dataset), settings=Settings(questions=str(dataset)), system=listening_system)
    assert not (run_folder / "results.json").exists()


def test_a_failure_leaves_nothing_behind(run_folder, dataset):
    def broken(waveforms):
        raise RuntimeError("out of memory")

    before = {path.name for path in run_folder.iterdir()}
    with pytest.raises(RuntimeError):
        evaluate(run_folder, str(dataset), system=System(transcribe=broken))
    assert {path.name for path in run_folder.iterdir()} == before


def test_checkpoint_is_a_run_or_a_model(run_folder, tmp_path, dataset):
    run, model = find_checkpoint(run_folder), find_checkpoint(run_folder / "model")
    assert identity(run)["sha256"] == identity(model)["sha256"]
    assert model.train["train_seconds"] == 12.5
    with pytest.raises(CheckpointError, match="no checkpoint"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no saved model"):
        find_checkpoint(dataset)
    before = identity(run)["sha256"]
    (run_folder / "model" / "model.safetensors").write_bytes(b"weightz")
    assert identity(run)["sha256"] != before


def test_other_data_do_not_overwrite_the_run(run_folder, dataset):
    found = find_checkpoint(run_folder)
    assert default_output(found, str(dataset), "heldout") == run_folder
    assert default_output(found, "asterisk-en", "heldout") == run_folder / "evaluations" / "asterisk-en-heldout"


@pytest.mark.parametrize(
    ("options", "left_out"),
    [
        ({"limit": 3}, ["5 of 8 clips", "1 of 4 spoken questions"]),
        ({"fast": True}, ["the bounds (--fast)"]),
        ({"questions": None}, ["the spoken questions of QUESTIONS"]),
    ],
)
def test_a_part_does_not_overwrite_the_whole(run_folder, dataset, questions, listening_system, options, left_out):
    config = {"evaluation": {"source": str(dataset), "split": "heldout", "question_source": str(questions)}}
    (run_folder / "config.yaml").write_text(json.dumps(config))
    whole = {"questions": str(questions), "num_bootstrap": 20}
    _, folder = evaluate(run_folder, str(dataset), settings=Settings(**whole), system=listening_system)
    assert folder == run_folder
    before = (folder / "results.json").read_bytes()
    settings = Settings(**whole | options)
    results, folder = evaluate(run_folder, str(dataset), settings=settings, system=listening_system)
    assert folder == run_folder / "evaluations" / "tones-heldout-partial"
    assert json.loads((folder / "results.json").read_text()) == results
    assert results["left_out"] == [part.replace("QUESTIONS", str(questions)) for part in left_out]
    assert (run_folder / "results.json").read_bytes() == before


def test_in_batches_keeps_the_order():
    seen = []

    def function(batch):
        seen.append(list(batch))
        return [f" {item} " for item in batch]

    assert in_batches(function, [3, 1, 2], batch_size=2, cost=[3, 1, 2]) == ["3", "1", "2"]
    assert seen == [[3, 2], [1]]
    with pytest.raises(ValueError, match="2 items went in, 1 texts came out"):
        in_batches(lambda batch: ["one"], [1, 2], batch_size=2)
