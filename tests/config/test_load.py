"""Configurations: reading, merging, overriding, and the errors that name the place."""

from pathlib import Path

import pytest

from ultravox.config.load import dump_config, load_config, parse_config
from ultravox.errors import ConfigError

BASE = """\
version: 1
seed: 7
model:
  language_model_lora: {rank: 16}
data:
  sources:
    - {name: asterisk-en}
    - {name: spoken-requests-en, task: answer}
stages:
  - name: align
    objective: align
    max_steps: 100
    sources: [asterisk-en]
    optim:
      lr: {projector: 1e-3}
  - name: tune
    objective: tune
    max_steps: 50
    optim: {warmup_steps: 5}
"""


@pytest.fixture
def write(tmp_path: Path):
    def _write(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return _write


def test_values_and_defaults(write):
    config = load_config(write(BASE))
    assert config.seed == 7
    assert [stage.name for stage in config.stages] == ["align", "tune"]
    assert config.stages[0].optim.lr.projector == pytest.approx(1e-3)
    assert config.model.language_model_lora.effective_alpha == 32
    assert "gate_proj" in config.model.language_model_lora.target_modules
    assert "fc1" in config.model.audio_encoder_lora.target_modules
    assert config.run_dir == "runs/run"


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", "1.0e-4", "'1e-4'", "+1e-04", ".0001"])
def test_every_way_to_write_a_small_number(write, text):
    config = load_config(write(BASE.replace("projector: 1e-3", f"projector: {text}")))
    assert config.stages[0].optim.lr.projector == 1e-4


@pytest.mark.parametrize("text", ["1e2", "100", "1_00", "'100'"])
def test_whole_numbers(write, text):
    assert load_config(write(BASE.replace("max_steps: 100", f"max_steps: {text}"))).stages[0].max_steps == 100


@pytest.mark.parametrize(("word", "truth"), [("on", True), ("off", False)])
def test_on_and_off_are_words(write, word, truth):
    config = load_config(write(BASE + f"    packing: {word}\nlogging: {{tensorboard: {word}}}"))
    assert config.stages[1].packing == word
    assert config.logging.tensorboard is truth
    assert parse_config(dump_config(config)) == config
    other = {"on": "off", "off": "on"}[word]
    assert load_config(write(BASE), ["--stages.tune.packing", other]).stages[1].packing == other


def test_dump_and_load_are_inverse(write, tmp_path):
    config = load_config(write(BASE), ["--data.speeds", "[0.9, 1.0, 1.1]", "--run_dir", "runs/other"])
    assert parse_config(dump_config(config)) == config
    saved = write(dump_config(config), "saved.yaml")
    assert load_config(saved) == config


# One parent


def test_extends_merges_sections_and_stages_by_name(write):
    write(BASE, "base.yaml")
    child = write(
        "extends: base.yaml\n"
        "model: {stack_factor: 10}\n"
        "stages:\n"
        "  - {name: tune, max_steps: 20}\n"
        "  - {name: more, objective: tune, max_steps: 3}\n",
        "child.yaml",
    )
    config = load_config(child)
    assert config.model.stack_factor == 10
    assert config.model.language_model_lora.rank == 16
    assert [(stage.name, stage.max_steps) for stage in config.stages] == [("align", 100), ("tune", 20), ("more", 3)]
    assert config.stages[1].optim.warmup_steps == 5


def test_other_lists_are_replaced(write):
    write(BASE + "", "base.yaml")
    child = write("extends: base.yaml\nmodel: {language_model_lora: {target_modules: [q_proj]}}\n", "child.yaml")
    assert load_config(child).model.language_model_lora.target_modules == ["q_proj"]


def test_parent_is_relative_to_the_file(write, tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    write(BASE, "base.yaml")
    (tmp_path / "sub" / "child.yaml").write_text("extends: ../base.yaml\nseed: 1\n")
    monkeypatch.chdir("/")
    assert load_config(tmp_path / "sub" / "child.yaml").seed == 1


def test_run_dir_is_not_inherited(write):
    write("run_dir: runs/parent\n" + BASE, "base.yaml")
    assert load_config(write("extends: base.yaml\n", "child.yaml")).run_dir == "runs/child"
    assert load_config(write("extends: base.yaml\nrun_dir: x/y\n", "own.yaml")).run_dir == "x/y"


def test_circle(write):
    write("extends: b.yaml\n", "a.yaml")
    with pytest.raises(ConfigError, match=r"circle .*b\.yaml → a\.yaml → b\.yaml"):
        load_config(write("extends: a.yaml\n", "b.yaml"))


# Overrides


def test_overrides_by_name_index_and_both_forms(write):
    config = load_config(
        write(BASE),
        [
            *("--stages.tune.max_steps", "10"),
            "--stages.0.optim.lr.projector=2e-4",
            *("--data.sources.spoken-requests-en.repeat", "3"),
            *("--model.language-model-lora.alpha", "null"),
            *("--evaluation.source", "my/clips.jsonl"),
        ],
    )
    assert config.stages[1].max_steps == 10
    assert config.stages[0].optim.lr.projector == 2e-4
    assert config.data.sources[1].repeat == 3
    assert config.evaluation.source == "my/clips.jsonl"


def test_a_stage_with_no_steps_is_left_out(write):
    assert [stage.name for stage in load_config(write(BASE), ["--stages.align.max_steps", "0"]).stages] == ["tune"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--stages.tun.max_steps", "1"], r"nothing named 'tun' in stages \(align, tune\); did you mean 'tune'\?"),
        (["--stages.tune.max_stps", "1"], r"unknown key 'max_stps' in stages\.tune; did you mean 'max_steps'\?"),
        (["--optm.lr", "1"], "unknown key 'optm'"),
        (["--checkpoints.nebula", "true"], r"unknown key 'nebula' in checkpoints: Nebula has been ended by Microsoft"),
        (["--engine.kind", "ORTModule"], r"got 'ORTModule': ONNX Runtime training .* torch\.compile .* for inference"),
        (["--ortmodule.enabled", "true"], r"unknown key 'ortmodule': ONNX Runtime training \(ORTModule"),
        (["--seed"], "--seed lacks its value"),
        (["--seed", "--run_dir", "x"], "--seed lacks its value"),
        (["--seed.x", "1"], "seed is a value"),
        (["seed", "1"], "expected an override"),
        (["--model.stack_factor", "0"], r"--model.stack_factor: .*expected an integer ≥ 1, ≤ 50, got 0"),
        (["--stages.align.max_steps", "0", "--stages.tune.max_steps", "0"], "every stage has max_steps 0"),
        (["--stages.3.max_steps", "0"], "nothing named '3'"),
        (["--data.speeds", "[1, 1.0]"], "one speed twice"),
        (["--seed", "[1"], r"seed: expected an integer ≥ 0, < 4294967296, got '\[1'"),
        (
            ["--stages.tune.max_steps", "3"],
            r"line: --stages.tune.max_steps: .*--stages.tune.optim.warmup_steps 0",
        ),
    ],
)
def test_wrong_overrides(write, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(BASE), overrides)


# Mistakes in the file: what is wrong, and where


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    optim:\n", "    optm:\n", r"run\.yaml:14: unknown key 'optm' in stages\.align; did you mean 'optim'\?"),
        ("seed: 7", "sead: 7", r"run\.yaml:2: unknown key 'sead'; did you mean 'seed'\?"),
        ("rank: 16", "rnk: 16", r"run\.yaml:4: unknown key 'rnk' in model.language_model_lora; did you mean 'rank'"),
        ("seed: 7", "seed: 7\nseed: 8", r"run\.yaml:3: key 'seed' was already given in line 2"),
        ("rank: 16", "rank: 16, rank: 8", r"run\.yaml:4: key 'model.language_model_lora.rank' was already given"),
        ("seed: 7", "seed: -1", r"run\.yaml:2: seed: expected an integer ≥ 0, < 4294967296, got -1$"),
        ("seed: 7", "seed: true", r"run\.yaml:2: seed: expected an integer .*, got true$"),
        ("seed: 7", "seed: many", r"run\.yaml:2: seed: expected an integer .*, got 'many'$"),
        ("max_steps: 50", "max_steps: 1.5", r"run\.yaml:18: stages\.tune\.max_steps: .*got 1.5"),
        (
            "projector: 1e-3",
            "projector: .nan",
            r"run\.yaml:15: stages\.align.*a finite number ≥ 0, ≤ 1, got nan$",
        ),
        ("projector: 1e-3", "projector: .inf", r"run\.yaml:15: "),
        ("projector: 1e-3", "projector: 3", r"expected a number ≥ 0, ≤ 1, got 3$"),
        ("warmup_steps: 5", "warmup_steps: 51", r"run\.yaml:19: stages\.tune: .*warmup_steps \(51\) exceeds max_"),
        ("    max_steps: 50\n", "", r"run\.yaml:16: key 'max_steps' is missing in stages\.tune: add it, an int"),
        (
            "objective: tune",
            "objective: tuna",
            r"run\.yaml:17: .*objective: expected 'align' or 'tune', got 'tuna'; did",
        ),
        ("name: tune", "name: align", "two stages are named 'align'"),
        ("sources: [asterisk-en]", "sources: [asterisk]", "uses source 'asterisk', but data.sources holds"),
        ("sources: [asterisk-en]", "sources: [spoken-requests-en]", "none of its sources has that task"),
        ("    objective: tune\n", "    objective: tune\n    align: {match_weight: 1}\n", "'align' have no effect"),
        ("    objective: align\n", "    objective: align\n    tune: {loss_mask: all_text}\n", "'tune' have no effect"),
        ("version: 1", "version: 2", r"run\.yaml:1: version"),
        (
            "{name: asterisk-en}",
            "{name: asterisk-en, filters: {min_seconds: 3, max_seconds: 2}}",
            r"run\.yaml:7: .*asterisk-en.filters: min_seconds = 3 is more than max_seconds = 2, so no clip is left",
        ),
        (
            "{name: asterisk-en}",
            "{name: asterisk-en, filters: {max_characters_per_second: 9, min_characters_per_second: 9.5}}",
            r"run\.yaml:7: .*min_characters_per_second = 9.5 is more than max_characters_per_second = 9, so",
        ),
        ("seed: 7", "seed: 7\n  x: 1", r"run\.yaml:3: not valid YAML"),
        ("seed: 7", "seed: !!python/object:os.system x", "not valid YAML"),
        ("model:\n", "model: &m\n  again: *m\n", "alias"),
        ("seed: 7", "1: 7", "a key must be a word, got 1"),
        ("rank: 16", "rank: 16}\n  audio_encoder_lora: {rank: 4}\n  train_audio_encoder: true #", "exclude each other"),
        ("seed: 7", "extends: [a, b]", "takes one file name"),
        ("seed: 7", "extends: nothing.yaml", "no such config file"),
    ],
)
def test_mistakes_name_their_place(write, old, new, message):
    assert old in BASE
    with pytest.raises(ConfigError, match=message):
        load_config(write(BASE.replace(old, new, 1)))


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["--stages.tune.sources", "[nope]"], "stages.tune.sources"),
        (["--stages.tune.align.match_weight", "2"], "stages.tune.align.match_weight"),
        (["--stages.tune.name", "align"], "stages.tune.name"),
    ],
)
def test_a_mistake_on_the_command_line_names_it(write, overrides, key):
    with pytest.raises(ConfigError, match=f"^command line: --{key}: "):
        load_config(write(BASE), ["--seed", "3", *overrides])


def test_of_two_keys_that_do_not_fit_the_childs_is_named(write):
    write(BASE, "base.yaml")
    child = write("extends: base.yaml\nstages:\n  - name: tune\n    max_steps: 2\n", "child.yaml")
    with pytest.raises(ConfigError, match=r"child\.yaml:4: stages\.tune: .*warmup_steps \(5\) exceeds"):
        load_config(child)


def test_a_mistake_in_the_parent_names_the_parent(write):
    write(BASE.replace("seed: 7", "seed: -1"), "base.yaml")
    with pytest.raises(ConfigError, match=r"base\.yaml:2: seed"):
        load_config(write("extends: base.yaml\n\nmodel: {stack_factor: 2}\n", "child.yaml"))


def test_a_mistake_in_a_merged_stage_names_the_child(write):
    write(BASE, "base.yaml")
    with pytest.raises(ConfigError, match=r"child\.yaml:3: unknown key 'optm' in stages\.tune"):
        load_config(write("extends: base.yaml\nstages:\n  - {name: tune, optm: 1}\n", "child.yaml"))


def test_missing_empty_and_binary_files(write, tmp_path):
    write(BASE, "quickstart.yaml")
    with pytest.raises(ConfigError, match=r"no such config file; did you mean '.*quickstart\.yaml'"):
        load_config(tmp_path / "quickstat.yaml")
    with pytest.raises(ConfigError, match="'stages' is missing"):
        load_config(write("", "empty.yaml"))
    with pytest.raises(ConfigError, match="keys and values, got list"):
        load_config(write("- 1\n", "list.yaml"))
    (tmp_path / "noise.yaml").write_bytes(bytes(range(128, 256)))
    with pytest.raises(ConfigError, match="cannot be read as a text file"):
        load_config(tmp_path / "noise.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


def test_a_file_is_not_suggested_to_itself(tmp_path):
    (tmp_path / "noext.yaml").write_text("extends: nofile.yaml\n")
    with pytest.raises(ConfigError, match=r"nofile\.yaml: no such config file$"):
        load_config(tmp_path / "noext.yaml", [])
    (tmp_path / "nofiles.yaml").write_text("seed: 1\n")
    with pytest.raises(ConfigError, match=r"did you mean .*nofiles\.yaml"):
        load_config(tmp_path / "noext.yaml", [])
