"""The programs in benchmarks/ are runs of what ships: their settings load, and they measure what they say."""

import importlib.util
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from ultravox.config.load import load_config

ROOT = Path(__file__).parent.parent


def load(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def defaults():
    return load("defaults")


def result(wer, threads, core_seconds=40):
    return {"wer": wer, "core_seconds": core_seconds, "trained": 2e6, "threads": threads, "jobs": 2 // threads}


def test_each_sweep_has_its_points_and_its_used_one_is_the_file_itself(defaults):
    for name, sweep in defaults.SWEEPS.items():
        file = ROOT / "configs" / f"benchmark-{sweep.stage}.yaml"
        configs = {point: load_config(file, overrides) for point, overrides in sweep.points.items()}
        assert len(configs) >= 3, name
        assert [point for point, config in configs.items() if config == load_config(file)] == [sweep.used], name


def test_one_run_serves_every_sweep_of_its_stage(defaults):
    run = {"wer": 0.3, "core_seconds": 40.0, "trained": 1}
    results = {"encoder": {"frozen": {"0": run}}}
    assert defaults.already_run(results, "stack_factor", "5", 0) == run
    assert defaults.already_run(results, "stack_factor", "5", 1) is None
    assert defaults.already_run(results, "stack_factor", "10", 0) is None
    assert defaults.already_run(results, "lora_rank", "16", 0) is None
    todo = defaults.missing(results, list(defaults.SWEEPS), 2)
    assert len(todo) == len(set(todo)) == 23 + 24
    assert ("encoder", "full, rate 2e-5", 0) in todo
    assert [name for name, point, seed in todo if point == defaults.SWEEPS[name].used and seed == 1] == [
        "align_lr",
        "lora_rank",
    ]


def test_the_page_shows_mean_and_interval(defaults):
    runs = {str(seed): result(wer, 2) for seed, wer in enumerate((0.30, 0.32, 0.34))}
    page = defaults.page({"stack_factor": {"5": runs}})
    assert "| 5 (used) | 32.0% ± 5.0 | 3 | 40 | 2.0 M |" in page  # 4.30 · 2.0 / √3
    assert "`stack_factor`, after the stage `align`, with 2 threads\n" in page


def test_core_seconds_of_different_thread_counts_are_not_mixed(defaults):
    points = {"5": {"0": result(0.3, 2), "1": result(0.3, 2), "2": result(0.3, 1, 90)}, "6": {"0": result(0.3, 1, 90)}}
    page = defaults.page({"stack_factor": points})
    assert "| 5 (used) | 30.0% ± 0.0 | 3 | 40 | 2.0 M |" in page
    assert "| 6 | 30.0% | 1 | – | 2.0 M |" in page
    points["5"]["3"] = result(0.3, 2, None)  # paused on the way
    assert "| 5 (used) | 30.0% ± 0.0 | 4 | 40 | 2.0 M |" in defaults.page({"stack_factor": points})
    del points["5"]["3"]
    points["6"]["1"] = result(0.3, 2)
    page = defaults.page({"stack_factor": points})
    assert "with these numbers of threads (runs): 2 threads (3), 1 thread (2); core seconds are of those with 2" in page


@pytest.fixture
def results_file(defaults, tmp_path, monkeypatch):
    monkeypatch.setattr(defaults, "RESULTS", tmp_path / "defaults.json")
    monkeypatch.setattr(defaults, "PAGE", tmp_path / "defaults.md")
    return tmp_path / "defaults.json"


def call(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    module.main()


@pytest.mark.parametrize("error", [SystemExit("training failed"), KeyboardInterrupt()])
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failing_run_keeps_the_finished_ones_and_starts_no_other(
    defaults, results_file, monkeypatch, error, jobs, capsys
):
    begun = []

    def run(sweep, point, seed, jobs):
        begun.append(point)
        if point == "2e-3":
            raise error
        time.sleep(0.3)  # as long as it takes to notice
        return result(0.25, 2 // jobs)

    monkeypatch.setattr(defaults, "run", run)
    with pytest.raises(type(error)):
        call(defaults, monkeypatch, "align_lr", "match_weight", "--seeds", "5", "--jobs", str(jobs))
    kept = json.loads(results_file.read_text())
    assert kept["align_lr"]["1e-3"] == {"0": result(0.25, 2 // jobs)}
    assert len(begun) < 6
    assert sum(len(runs) for points in kept.values() for runs in points.values()) == len(begun) - 1
    assert "| 1e-3 | 25.0% | 1 |" in defaults.PAGE.read_text()

    monkeypatch.setattr(defaults, "run", lambda *_: result(0.2, 2))
    call(defaults, monkeypatch, "align_lr", "match_weight", "--seeds", "1")
    kept = json.loads(results_file.read_text())
    assert kept["align_lr"]["2e-3"] == kept["match_weight"]["0.5"] == {"0": result(0.2, 2)}
    assert kept["align_lr"]["1e-3"] == {"0": result(0.25, 2 // jobs)}  # and is not made again
    assert "align_lr = 2e-3, seed 0: WER 20.0%" in capsys.readouterr().out


def test_the_used_value_is_that_of_the_file(defaults):
    for sweep in defaults.SWEEPS.values():
        file = defaults.ROOT / "configs" / f"benchmark-{sweep.stage}.yaml"
        assert load_config(file, sweep.points[sweep.used]) == load_config(file), sweep.title


def test_a_run_is_the_command_with_one_key_changed(defaults, monkeypatch):
    def command(words, *, env, **_):
        summary = {
            "num_threads": int(env["OMP_NUM_THREADS"]),
            "num_trainable_parameters": 7,
            "stages": [{"name": "align", "final_wer": 0.3, "seconds": 10.0}],
        }
        folder = Path(words[words.index("--run_dir") + 1])
        folder.mkdir()
        (folder / "train.json").write_text(json.dumps(summary))
        assert words[-4:] == ["--seed", "3", "--model.stack_factor", "6"]
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(defaults.subprocess, "run", command)
    monkeypatch.setattr(defaults.os, "cpu_count", lambda: 4)
    found = defaults.run(defaults.SWEEPS["stack_factor"], "6", 3, 2)
    assert found == {"wer": 0.3, "core_seconds": 20.0, "trained": 7, "threads": 2, "jobs": 2}
    monkeypatch.setattr(defaults.subprocess, "run", lambda words, **_: subprocess.CompletedProcess(words, 2, "", "no"))
    with pytest.raises(SystemExit, match="failed with code 2"):
        defaults.run(defaults.SWEEPS["stack_factor"], "6", 3, 2)


@pytest.mark.parametrize(
    "arguments", [["--seeds", "0"], ["--seeds", "6"], ["--jobs", "0"], ["--jobs", "-1"], ["no-such-sweep"]]
)
def test_bad_arguments_are_refused(defaults, results_file, monkeypatch, arguments):
    with pytest.raises(SystemExit) as caught:
        call(defaults, monkeypatch, *arguments)
    assert caught.value.code == 2
    assert not results_file.exists()


def test_the_page_is_that_of_the_kept_results(defaults):
    assert defaults.PAGE.read_text() == defaults.page(json.loads(defaults.RESULTS.read_text()))


KEPT = ROOT / "benchmarks" / "results"


@pytest.fixture
def readme(tmp_path, monkeypatch):
    """benchmarks/readme.py, a run with the kept figures, a copy of the README and a call of the program on it."""
    module = load("readme")
    figures = json.loads((KEPT / "quickstart.json").read_text())
    run = tmp_path / "quickstart"
    run.mkdir()
    measured = {"fast": False, "data": {"limit": None}, "left_out": [], "evaluation_peak_memory_bytes": 3_210_000_000}
    (run / "results.json").write_text(json.dumps(figures | measured))
    (run / "train.json").write_text(json.dumps(figures["train"]))
    copy = tmp_path / "README.md"
    copy.write_text((ROOT / "README.md").read_text())
    paths = ["--readme", str(copy), "--kept", str(tmp_path / "kept")]
    return module, run, copy, lambda *words: call(module, monkeypatch, *map(str, words), *paths)


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_readmes_numbers_are_the_kept_ones(readme):
    text = (ROOT / "README.md").read_text()
    assert text == readme[0].with_table(text, readme[0].load_kept(KEPT)), "run `python benchmarks/readme.py`"


def test_the_readme_shows_what_was_measured(readme):
    _, run, copy, write = readme
    assert "| 3.2 GB |" not in copy.read_text()
    write(run)
    assert "| Peak memory of evaluation | 3.2 GB |" in copy.read_text()
    assert "| CPU threads of training | 2 |" in copy.read_text()
    assert "cut at 4 + 6 tokens a second of audio" in copy.read_text()
    assert copy.read_text().partition("### What")[2] == (ROOT / "README.md").read_text().partition("### What")[2]


def test_the_readme_of_a_run_without_questions(readme):
    _, run, copy, write = readme
    nothing = {"share": None, "interval": None, "absent": "no dataset of spoken questions was named"}
    change(run / "results.json", answers={**nothing, "swapped": nothing, "text": nothing})
    write(run)
    table = copy.read_text().partition("<!-- numbers")[2].partition("<!-- end")[0]
    assert "Word error rate" in table
    assert "question" not in table


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run, copy: change(run / "results.json", left_out=["3 of 9 clips"]), "without 3 of 9 clips"),
        (lambda run, copy: copy.write_text(copy.read_text().replace("<!-- end of numbers -->", "")), "must hold"),
        (lambda run, copy: (run / "results.json").unlink(), "has no results.json"),
        (lambda run, copy: run.rename(run.with_name("mine")), "shows the runs quickstart and asterisk-long, not mine"),
    ],
)
def test_what_the_readme_cannot_show_changes_nothing(readme, spoil, message, capsys):
    _, run, copy, write = readme
    spoil(run, copy)
    before = copy.read_text()
    folder = next(path for path in run.parent.iterdir() if path.is_dir())
    with pytest.raises(SystemExit) as caught:
        write(folder)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert copy.read_text() == before
    assert not list(run.parent.glob("kept/*"))


def test_a_part_is_shown_only_on_request(readme):
    _, run, copy, write = readme
    change(run / "results.json", left_out=["3 of 9 clips"])
    write(run, "--allow-partial")
    assert "3.2 GB" in copy.read_text()


def test_kept_figures_of_an_older_form_are_to_be_measured_again(readme, capsys):
    _, run, _, write = readme
    write(run)
    kept = run.parent / "kept" / "quickstart.json"
    train = json.loads(kept.read_text())["train"]
    del train["num_threads"]
    change(kept, train=train)
    with pytest.raises(SystemExit):
        write()
    assert "is of an older form: train and evaluate quickstart again" in capsys.readouterr().err


def test_matrix_products_and_attention_are_measured(monkeypatch, capsys):
    matmul = load("matmul")
    if not hasattr(matmul.torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this PyTorch is built without oneDNN, which the program compares with")
    monkeypatch.setattr(matmul, "SHAPES", [(128, 256, 192)])
    monkeypatch.setattr(matmul, "CALLS_FLOP", 1e8)
    monkeypatch.setattr(matmul, "REPEATS", 2)
    matmul.main()
    threads, _, shape, attention = capsys.readouterr().out.splitlines()
    assert threads.endswith(f"torch {matmul.torch.__version__}")
    assert shape.split()[:5] == ["128", "x", "256", "x", "192"]
    assert all(float(number) > 0 for number in shape.split()[5:])
    assert len(shape.split()) == 7
    assert [float(word) > 0 for word in attention.split() if word.replace(".", "").isdigit()] == [True] * 4


def test_planning_is_measured_in_fresh_processes(monkeypatch, tmp_path, capsys):
    plan = load("plan")
    monkeypatch.setattr(plan, "PADDING_ROWS", 3000)
    monkeypatch.setattr(plan, "REPEATS", 1)
    monkeypatch.setattr(plan, "asterisk", lambda: plan.librispeech_like(300))
    call(plan, monkeypatch, "--rows", "5000", "--results", str(tmp_path / "plan.json"))
    found = json.loads((tmp_path / "plan.json").read_text())
    assert all(runs[0]["peak_memory_bytes"] > 1e7 for runs in found["planning"].values())
    speech = found["padding"]["librispeech-like"]
    assert speech["padded"]["plan_token_padding"]["mean"] < 0.06 < speech["padded"]["fixed_size_token_padding"]["mean"]
    assert 0.95 < speech["best_fit"]["fill"]["mean"] <= 1
    assert "resuming late" in capsys.readouterr().out


def test_the_lengths_of_the_planning_benchmark_are_those_of_the_published_facts():
    plan = load("plan")
    audio, text = plan.librispeech_like(100_000)
    assert 12.0 < audio.mean() / 10 < 12.3  # seconds; icefall prints 12.1
    assert 3.7 < audio.std() / 10 < 4.5  # 4.2
    assert abs((text - plan.PROMPT_TOKENS).sum() / audio.sum() * 10 - plan.TOKENS_PER_SECOND) < 0.1


def test_the_kept_figures_of_planning_hold_the_targets():
    found = json.loads((KEPT / "plan.json").read_text())
    assert found["num_rows"] == 10_000_000
    for runs in found["planning"].values():
        assert min(run["seconds"] for run in runs) <= 30
        assert max(run["peak_memory_bytes"] for run in runs) <= 2e9
    early, late = (min(run["seconds"] for run in found["resuming"][place]) for place in ("early", "late"))
    assert late < 1.5 * early
    for data in found["padding"].values():
        assert data["padded"]["plan_token_padding"]["mean"] <= 0.05
    assert found["padding"]["librispeech-like"]["padded"]["plan_frame_padding"]["mean"] <= 0.05
    assert found["padding"]["librispeech-like"]["best_fit"]["fill"]["mean"] >= 0.98


def test_the_documents_figures_of_planning_are_the_kept_ones():
    modes = json.loads((KEPT / "plan.json").read_text())["padding"]["librispeech-like"]
    text = (ROOT / "docs" / "data.md").read_text()
    for kind, label in (("fixed_size", "fixed size, not sorted"), ("plan", "planned, padded")):
        token, frame = (modes["padded"][f"{kind}_{of}_padding"]["mean"] for of in ("token", "frame"))
        assert f"| {label} | {token:.1%} | {frame:.1%} |" in text
    assert f"sequences are {modes['best_fit']['fill']['mean']:.1%} full" in text


@pytest.mark.network
def test_tuning_is_measured_with_each_kernel(not_fetched):
    from ultravox.errors import NetworkError
    from ultravox.model.pretrained import fetch_model

    try:
        fetch_model("smollm2-135m-instruct")
    except NetworkError as error:
        not_fetched(error)
    command = [sys.executable, ROOT / "benchmarks" / "tuning.py", "--tokens", "120", "--steps", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()[1:]
    names = [line[:24].strip() for line in lines]
    assert (names[0], names[-1]) == ("plain PyTorch", "+ packed rows")
    assert all(float(line[24:].split()[0]) > 0 for line in lines)


def test_preparing_is_measured_in_speed_and_memory(tmp_path, monkeypatch, capsys):
    import numpy as np
    import soundfile

    prepare = load("prepare")
    rows = []
    for index in range(4):
        samples = np.random.default_rng(index).integers(-9000, 9000, 16000).astype(np.int16)
        soundfile.write(tmp_path / f"{index}.flac", samples, 16000)
        rows.append(json.dumps({"id": str(index), "audio": f"{index}.flac", "text": "words", "duration": 1.0}))
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    monkeypatch.setattr(prepare, "FORMS", {form: prepare.FORMS[form] for form in list(prepare.FORMS)[:2]})
    words = ["--source", str(tmp_path / "data.jsonl"), "--repeat", "2", "--rounds", "1", "--text-rows", "10"]
    call(prepare, monkeypatch, *words, "--results", str(tmp_path / "kept.json"))
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert json.loads(capsys.readouterr().out) == kept
    assert [form["audio_seconds"] for form in kept["speed"].values()] == [8.0, 8.0]
    assert all(form["times_real_time_per_core"]["mean"] > 0 for form in kept["speed"].values())
    assert kept["memory"]["audio"]["rows"] == [8, 32]
    assert kept["memory"]["text"]["rows"] == [10, 40]
    assert kept["random_read_microseconds"]["median"] > 0


def test_preparing_keeps_its_promises():
    """Of the kept measurement: many times real time on one core, and memory that does not grow with the corpus."""
    kept = json.loads((KEPT / "prepare.json").read_text())
    assert kept["speed"]["flac 16 kHz"]["times_real_time_per_core"]["mean"] >= 150
    assert kept["speed"]["flac 16 kHz"]["times_real_time_per_core"]["n"] >= 3
    assert all(kind["ratio"] < 1.1 and kind["rows"][1] == 4 * kind["rows"][0] for kind in kept["memory"].values())


def test_memory_is_predicted_as_well_as_promised():
    """Of the kept measurement, under a limit: no batch took more than was predicted, no prediction is 15 % above it."""
    kept = json.loads((KEPT / "memory.json").read_text())
    shares = [batch["predicted"] / batch["measured"] for batch in kept["batches"]]
    assert len(shares) == kept["summary"]["ran"] == 50
    assert min(shares) >= 1
    assert max(shares) <= 1.15
    assert all(batch["planned"] >= batch["predicted"] for batch in kept["batches"])
    assert kept["summary"]["beside_base_min"] == pytest.approx(min(shares) - 1)
    space = kept["address_space"]
    assert space["limit"] == space["before_calibration"] + space["largest_prediction"] + space["slack"]
    assert space["largest_prediction"] == max(batch["predicted"] for batch in kept["batches"])
    assert space["most_beyond_prediction"] < space["slack"] < 0.1 * space["largest_prediction"]


def test_the_feature_cache_is_measured(tmp_path, monkeypatch):
    module = load("cache")
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    words = ["--entries", "30", "--clips", "20", "--no-step", "--results", str(tmp_path / "cache.json")]
    call(module, monkeypatch, *words)
    figures = json.loads((tmp_path / "cache.json").read_text())
    kept = json.loads((KEPT / "cache.json").read_text())
    assert {*figures, "step"} == set(kept), "the kept figures are of another form: run `python benchmarks/cache.py`"
    for part in ("start", "reading", "decoding"):
        assert set(figures[part]) == set(kept[part])
        assert all(value > 0 for value in figures[part].values())


def test_what_the_docs_say_of_logits_and_metrics_is_what_was_measured():
    kept = json.loads((ROOT / "benchmarks" / "results" / "logits.json").read_text())
    page = (ROOT / "docs" / "training-log.md").read_text()
    share = kept["metrics_share"]
    assert f"{share['mean']:.2%} [{100 * share['least']:.2f}, {100 * share['most']:.2f}] of a step" in page
    for key in ("time_of_full", "memory_of_full"):
        assert f"{kept[key]['mean']:.2f} × [{kept[key]['least']:.2f}, {kept[key]['most']:.2f}]" in page
        assert kept[key]["n"] == 5
    assert share["most"] < 0.03


def test_logits_are_measured_as_they_are_made():
    """One short round of each variant, in processes of their own."""
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "logits.py", "--rounds", "1", "--tokens", "240", "--steps", "1"],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.split()[0] for line in done.stdout.splitlines()[:2]] == ["supervised", "full"]
    assert "metrics:" in done.stdout


@pytest.fixture
def projectors(tmp_path, monkeypatch):
    """benchmarks/projectors.py, whose results and page are copies."""
    module = load("projectors")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "projectors.json")
    monkeypatch.setattr(module, "PAGE", tmp_path / "projectors.md")
    (tmp_path / "projectors.md").write_text((ROOT / "docs" / "projectors.md").read_text())
    return module


def test_the_projectors_page_is_that_of_the_kept_results():
    module = load("projectors")
    kept, text = json.loads(module.RESULTS.read_text()), module.PAGE.read_text()
    assert module.page(text, kept) == text, "run `python benchmarks/projectors.py`"
    assert set(kept["speed"]) == set(module.FORMS)
    assert len({one["audio_seconds_per_second"]["n"] for one in kept["speed"].values()}) == 1, "not one run"
    assert len({one["threads"] for one in kept["speed"].values()}) == 1, "not one run"


def test_projectors_are_measured(projectors, monkeypatch, capsys):
    call(projectors, monkeypatch, "--rounds", "1", "--audio-seconds", "6")
    found = json.loads(projectors.RESULTS.read_text())
    assert set(found["speed"]) == set(projectors.FORMS)
    kept = json.loads((KEPT / "projectors.json").read_text())
    for name, one in found["speed"].items():
        assert one["audio_seconds_per_second"]["least"] > 0
        for figure in ("parameters", "positions_per_second"):
            assert one[figure] == kept["speed"][name][figure]
    assert found["speed"]["quickstart"]["parameters"] == 1920 * 2048 + 1024 * 576 + 1920 + 1024
    assert found["speed"]["swiglu-200ms"]["positions_per_second"] == 5
    assert "| `mlp` | " in capsys.readouterr().out
    assert "| WER |" not in projectors.PAGE.read_text().partition(projectors.BEGIN)[2]


def test_projectors_are_trained_for_the_same_time(projectors, monkeypatch):
    runs = []

    def train(name, seed, steps):
        runs.append((name, seed, steps))
        wer = {"mlp": 0.5, "conv": 0.4}[name] + 0.02 * seed
        return {"seconds": steps * 0.5 + 3, "evaluation_seconds": 3.0, "final_wer": wer}

    monkeypatch.setattr(projectors, "train", train)
    results = json.loads((KEPT / "projectors.json").read_text()) | {"align": {}}
    projectors.RESULTS.write_text(json.dumps(results))
    call(projectors, monkeypatch, "conv", "mlp", "--align-seconds", "90", "--seeds", "3")
    assert runs[:2] == [("conv", 0, projectors.PILOT_STEPS), ("mlp", 0, projectors.PILOT_STEPS)]
    assert runs[2:5] == [("conv", 0, 180), ("conv", 1, 180), ("conv", 2, 180)]
    page = projectors.PAGE.read_text()
    assert "| `conv` | 42.0% ± 5.0 | 3 | 180 | 500 |" in page  # 4.30 · 2.0 / √3
    assert "| `mlp` | 52.0% ± 5.0 | 3 | 180 | 500 |" in page
    assert json.loads(projectors.RESULTS.read_text())["speed"] == results["speed"]
    call(projectors, monkeypatch, "conv", "mlp", "--align-seconds", "90", "--seeds", "4")
    assert runs[8:] == [("conv", 3, 180), ("mlp", 3, 180)]  # only what is missing


def test_a_form_that_is_timed_later_is_timed_beside_the_default(projectors, monkeypatch):
    """The machine takes twice as long now as it did for the kept figures: half as many seconds count."""
    results = json.loads((KEPT / "projectors.json").read_text())
    kept = results["align"] = {projectors.USED: results["align"][projectors.USED]}
    slow = 2 * kept[projectors.USED]["seconds_per_step"]
    monkeypatch.setattr(projectors, "step_seconds", lambda name: {projectors.USED: slow, "conv": 0.5}[name])
    monkeypatch.setattr(projectors, "train", lambda name, seed, steps: {"final_wer": 0.25})
    projectors.RESULTS.write_text(json.dumps(results))
    call(projectors, monkeypatch, "conv", "--align-seconds", "90", "--seeds", "1")
    assert "| `conv` | 25.0% | 1 | 360 | 250 |" in projectors.PAGE.read_text()


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--seeds", "6"], ["--rounds", "0"], ["no-such-form"]])
def test_bad_arguments_of_the_projectors_are_refused(projectors, monkeypatch, arguments):
    with pytest.raises(SystemExit) as caught:
        call(projectors, monkeypatch, *arguments)
    assert caught.value.code == 2
    assert not projectors.RESULTS.exists()


def test_a_projectors_training_is_the_command_on_its_file(projectors, monkeypatch):
    def command(words, **_):
        file, overrides = words[4], words[5:]
        config = load_config(file, overrides)
        (stage,) = config.stages
        assert (config.model.projector, config.seed, stage.name, stage.max_steps) == ("mlp", 2, "align", 180)
        assert (stage.optim.warmup_steps, stage.evaluate_every) == (18, 0)
        summary = {"stages": [{"name": "align", "final_wer": 0.3, "seconds": 90.0, "evaluation_seconds": 0.0}]}
        folder = Path(config.run_dir)
        folder.mkdir()
        (folder / "train.json").write_text(json.dumps(summary))
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(projectors.subprocess, "run", command)
    assert projectors.train("mlp", 2, 180)["final_wer"] == 0.3
    monkeypatch.setattr(
        projectors.subprocess, "run", lambda words, **_: subprocess.CompletedProcess(words, 2, "", "no")
    )
    with pytest.raises(SystemExit, match="failed with code 2"):
        projectors.train("mlp", 2, 180)


@pytest.fixture(scope="module")
def recipes():
    sys.path.insert(0, str(ROOT / "benchmarks"))  # it shares functions with defaults.py, as when it is run by itself
    try:
        return load("recipes")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_each_recipe_is_another_configuration(recipes):
    for name, question in recipes.QUESTIONS.items():
        configs = [load_config(recipes.CONFIG, overrides) for overrides in question.runs.values()]
        assert len(configs) >= 8, name
        assert all(config not in configs[:index] for index, config in enumerate(configs)), name
    cells = {name: load_config(recipes.CONFIG, o) for name, o in recipes.QUESTIONS["cells"].runs.items()}
    assert {len(config.stages) for name, config in cells.items() if "no align" in name} == {1}
    assert {(c.model.downsampling, c.model.stack_factor) for c in cells.values()} == set(recipes.WAYS.values())


def test_the_recipes_page_has_intervals_where_there_are_several(recipes):
    found = {"wer": 0.3, "kept_out_token_accuracy": 0.8, "swapped_token_accuracy": 0.4, "audio_use_margin": 2.5}
    runs = {str(seed): {**found, "wer": wer, "cpu_seconds": 300.0} for seed, wer in enumerate((0.30, 0.32, 0.34))}
    page = recipes.page({"cells": {"stack 5, align": runs, "mean 5, align": {"0": runs["0"]}}})
    assert "| stack 5, align | 32.0% ± 5.0 | 80.0% ± 0.0 | 40.0% ± 0.0 | 2.50 ± 0.00 | 3 | 5.0 |" in page
    assert "| mean 5, align | 30.0% | 80.0% | 40.0% | 2.50 | 1 | 5.0 |" in page
    assert "| – |" in recipes.page({"objectives": {"z-loss 1e-4": {"0": runs["0"]}}})


def test_a_run_that_is_known_under_another_question_is_not_done_again(recipes):
    found = {"wer": 0.3, "cpu_seconds": 1.0}
    results = {"cells": {"stack 5, align": {"0": found}, "stride 5, align": {"0": {"wer": 0.9}}}}
    overrides = recipes.QUESTIONS["objectives"].runs["cross-entropy"]
    assert recipes.known_twin(results, overrides, 0) == found
    assert recipes.known_twin(results, overrides, 1) is None
    assert recipes.known_twin(results, recipes.QUESTIONS["objectives"].runs["z-loss 1e-4"], 0) is None


def test_a_recipes_row_is_what_its_log_says_last(recipes, tmp_path):
    rows = [{"stage": "align", "loss": 1.0, "wer": 0.9}]
    rows += [{"stage": "tune", "loss": 2.0, "next_frame_skill": skill} for skill in (0.9, 0.1, 0.2, 0.3, 0.4, 0.5)]
    evaluation = {"kept_out_token_accuracy": 0.8, "swapped_token_accuracy": 0.4, "audio_use_margin": 2.5}
    rows += [{"stage": "tune", "wer": 0.5}, {"stage": "tune", "wer": 0.3, **evaluation}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    found = recipes.read(tmp_path)
    assert found == {"wer": 0.3, **evaluation, "next_frame_skill": pytest.approx(0.3)}


@pytest.fixture(scope="module")
def engines():
    return load("engines")


def test_both_loops_make_the_same_steps(engines, tmp_path, monkeypatch):
    """Else their times could not be compared."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "training")
    from toy_task import Position, ToyTask

    optim = SimpleNamespace(weight_decay=0.01, betas=(0.9, 0.99), eps=1e-8, max_grad_norm=0.5)
    stage = SimpleNamespace(name="toy", optim=optim, log_every=1)
    tasks = [ToyTask(noise=0.0), ToyTask(noise=0.0)]
    batches = [tasks[0].make_batch(tasks[0].order.batch(0, 0, index), Position(0, 0, index)) for index in range(4)]
    for task in tasks:
        groups = [replace(group, parameters=dict(group.parameters)) for group in task.parameter_groups()]
        monkeypatch.setattr(task, "parameter_groups", lambda groups=groups: groups)
    ours, bare = engines.OurLoop(stage, tasks[0], tmp_path), engines.BareLoop(stage, tasks[1])
    for _ in range(3):
        ours(batches)
        bare(batches)
    logged = [json.loads(line)["loss"] for line in (tmp_path / "toy.jsonl").read_text().splitlines()]
    assert len(logged) == 12
    assert bare.losses == pytest.approx(logged, rel=1e-4)
    assert sum(logged[8:]) < 0.9 * sum(logged[:4])


def test_the_interval_of_a_median(engines):
    found = engines.median_and_interval([1.0, 1.1, 1.2, 1.3, 9.0])
    assert found["median"] == 1.2
    assert 1.0 <= found["low"] < 1.2 < found["high"] <= 9.0
    assert engines.median_and_interval([2.0, 2.0, 2.0]) == {"median": 2.0, "low": 2.0, "high": 2.0, "n": 3}


def test_what_two_processes_are_held_against_is_the_same_run(engines, monkeypatch, tmp_path):
    """Two batches a step of half of the quickstart's tokens; one thread each, or two."""
    started = []

    class Process:
        returncode = 0

        def __init__(self, words, env, **_):
            config = load_config(words[4], words[5:])
            started.append((config, env["OMP_NUM_THREADS"], env.get("RANK")))
            if env.get("RANK", "0") == "0":
                folder = Path(config.run_dir)
                folder.mkdir()
                rows = [{"stage": "align", "elapsed_seconds": 2.0 * n, "loss": 1.0} for n in range(1, 5)]
                (folder / "log.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")

        def communicate(self):
            return b"", b""

    monkeypatch.setattr(engines.subprocess, "Popen", Process)
    monkeypatch.delenv("RANK", raising=False)
    stages = {stage.name: stage for stage in load_config(engines.CONFIG).stages}
    found = [engines.train(tmp_path / str(size), size, stages) for size in (1, 2)]
    assert engines.counted_seconds(found[0]["align"]) == 4.0
    assert [(threads, rank) for _, threads, rank in started] == [("2", None), ("1", "0"), ("1", "1")]
    assert [config.engine.kind for config, *_ in started] == ["single", "ddp", "ddp"]
    for config, *_ in started:
        assert config.stages == started[0][0].stages
        assert [(stage.accumulation_steps, stage.max_batch_tokens) for stage in config.stages] == [(2, 300), (2, 725)]
    Process.returncode = 2
    with pytest.raises(SystemExit, match="a run on 2 processes failed"):
        engines.train(tmp_path / "bad", 2, stages)


def test_the_engines_table_and_arguments(engines, monkeypatch, tmp_path, capsys):
    found = {"checkpoint": {"tune": {"median": 0.03, "low": 0.02, "high": 0.04, "n": 20}, "megabytes": 113.0}}
    line = f"| {engines.WHAT['checkpoint'].format('tune')} | 0.030 (0.020 to 0.040), 20 | at most 0.05 |"
    assert engines.table(found).splitlines()[2:] == [line]
    results = tmp_path / "engines.json"
    results.write_text(json.dumps({"ranks": {"align": found["checkpoint"]["tune"]}}))
    monkeypatch.setattr(engines, "Workbench", lambda: None)
    monkeypatch.setattr(engines, "checkpoint", lambda *_: found["checkpoint"])
    call(engines, monkeypatch, "--parts", "checkpoint", "--results", str(results))
    assert set(json.loads(results.read_text())) == {"ranks", "version", "cpus", "threads", "checkpoint"}
    assert line in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        call(engines, monkeypatch, "--rounds", "0")
    assert caught.value.code == 2
