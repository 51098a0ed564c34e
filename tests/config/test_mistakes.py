"""What a wrong configuration is told: every mistake, where it stands, what was expected and what to change."""

from pathlib import Path

import pytest

from ultravox.cli.main import main
from ultravox.config.load import load_config
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


def mistakes(write, text: str, *overrides: str) -> list[str]:
    """The lines of the error, each without the folder that it names."""
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert all("\n" not in line for line in caught.value.mistakes)
    return [line.replace(f"{path.parent}/", "") for line in caught.value.mistakes]


def test_all_mistakes_are_said_a_line_each(write):
    lines = mistakes(write, "stages: 3\nmodel: 4\nextra: 5\n", "--seed", "-1")
    assert lines == [
        "run.yaml:3: unknown key 'extra'; known here: version, run_dir, seed, model, data, stages, evaluation, "
        "logging, device, performance, engine, checkpoints, init_from",
        "command line: --seed: expected an integer ≥ 0, < 4294967296, got -1",
        "run.yaml:2: model: expected a section of keys (language_model, audio_encoder, stack_factor, …), got 4",
        "run.yaml:1: stages: expected a list of sections of keys (name, objective, max_steps, …), got 3",
    ]


def test_more_than_ten_mistakes_are_counted(write):
    lines = mistakes(write, BASE + "".join(f"wrong{number}: 1\n" for number in range(13)))
    assert len(lines) == 11
    assert lines[-1] == "and 3 more"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "prompts: text",
            "prompts: expected 'first', 'all' or a list of texts, got 'text'; for a list of one, write [text]",
        ),
        (
            "prompts: ['']",
            "prompts[0]: expected a text that is not empty, got ''; fill it in or take it out",
        ),
        (
            "prompts: []",
            "prompts: expected 'first', 'all' or a list that is not empty, of texts, got []; without the key it "
            "is first",
        ),
        (
            "prompts: [3]",
            "prompts[0]: expected a text, got 3; write '3' if it is a text",
        ),
        (
            "prompts: ",
            "prompts: expected 'first', 'all' or a list of texts, got nothing; without the key it is first",
        ),
        (
            "prompts: frist",
            "prompts: expected 'first', 'all' or a list of texts, got 'frist'; did you mean 'first'?",
        ),
        (
            "speeds: 1.1",
            "speeds: expected a list of numbers ≥ 0.5, ≤ 2 or null, got 1.1; for a list of one, write [1.1]",
        ),
        (
            "speeds: [1, fast]",
            "speeds[1]: expected a number ≥ 0.5, ≤ 2, got 'fast'",
        ),
        (
            "columns: {'': x}",
            "columns: expected a name as each key, got ''",
        ),
        (
            "columns: {text: ''}",
            "columns.text: expected a text that is not empty, got ''; fill it in",
        ),
        (
            "columns: [text]",
            "columns: expected a section of keys, each with a text, got ['text']",
        ),
        (
            "streaming: 3",
            "streaming: expected true or false, got 3",
        ),
        (
            "response: true",
            "response: expected a text or null, got true; write 'true' if it is a text",
        ),
    ],
)
def test_shapes_that_do_not_fit_say_what_does(write, source, message):
    text = f"{BASE.replace('{name: asterisk-en}', '{name: asterisk-en, ' + source + '}')}"
    assert mistakes(write, text) == [f"run.yaml:7: data.sources.asterisk-en.{message}"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "data: {sources: []}",
            "data.sources: expected a list that is not empty, of sections of keys (name, …), got []; leave the "
            "key out for its default",
        ),
        (
            "data: {sources: mine}",
            "data.sources: expected a list of sections of keys (name, …), got 'mine'; for a list of one, write "
            "[{name: mine}]",
        ),
        (
            "data: {sources: {name: mine}}",
            "data.sources: expected a list of sections of keys (name, …), got {'name': 'mine'}; for a list of "
            "one, write [{name: mine}]",
        ),
        (
            "data: {sources: [mine]}",
            "data.sources[0]: expected a section of keys (name, …), got 'mine'; write {name: mine}",
        ),
        (
            "data: ",
            "data: expected a section of keys (sources, temperature, speeds, …), got nothing; leave the key out "
            "for its default",
        ),
        (
            "data: {sources: [{split: a}]}",
            "key 'name' is missing in data.sources[0]: add it, a text",
        ),
        (
            "stages: [{name: tun, max_steps: 3}]",
            "key 'objective' is missing in stages.tun: add it, 'align' or 'tune'; did you mean to change 'tune', "
            "which is there?",
        ),
        (
            "stages: [{name: tune, optim: {betas: [0.9]}}]",
            "stages.tune.optim.betas: expected a list of 2 numbers ≥ 0, < 1, got [0.9]",
        ),
        (
            "stages: [{name: Tune, objective: tune, max_steps: 1}]",
            "stages.Tune.name: expected a name of lower-case letters, digits and _ that begins with a letter, got"
            " 'Tune'",
        ),
        (
            "model: {projector_hidden_size: 3}",
            "model.projector_hidden_size: expected an integer ≥ 2, a multiple of 2, got 3",
        ),
    ],
)
def test_sections_that_do_not_fit_say_what_does(write, text, message):
    write(BASE, "base.yaml")
    where = "run.yaml:2: "
    assert mistakes(write, f"extends: base.yaml\n{text}\n") == [where + message]


# An inherited stage


def test_an_inherited_stage_is_left_out_and_need_not_fit(write):
    """Its source is gone, and no other one has transcripts: that is no matter, since it does not train."""
    write(BASE, "base.yaml")
    own = "extends: base.yaml\ndata: {sources: [{name: own.jsonl, task: answer}]}\n"
    assert mistakes(write, own) == [
        "run.yaml:2: stage 'align' uses source 'asterisk-en', but data.sources holds own.jsonl: name one of these in "
        "its sources (max_steps: 0 leaves the stage out)"
    ]
    config = load_config(write(own + "stages: [{name: align, max_steps: 0}]\n"))
    assert [stage.name for stage in config.stages] == ["tune"]
    assert load_config(write(own), ["--stages.align.max_steps", "0"]) == config


def test_the_line_that_gave_the_value_is_named_without_detours(write, tmp_path):
    (tmp_path / "sub").mkdir()
    write(BASE.replace("warmup_steps: 5", "warmup_steps: 60"), "base.yaml")
    child = tmp_path / "sub" / "child.yaml"
    child.write_text("extends: ../base.yaml\nstages:\n  - {name: align,\n     max_steps: -1}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "sub" / ".." / "sub" / "child.yaml")
    assert [line.partition(": ")[0] for line in caught.value.mistakes] == [f"{child}:4", f"{tmp_path}/base.yaml:19"]


def test_a_parent_that_is_missing_names_who_wanted_it(write):
    child = write("seed: 1\nextends: other/../nothing.yaml\n", "child.yaml")
    with pytest.raises(ConfigError, match=r"child\.yaml:2: extends: .*nothing\.yaml: no such config file") as caught:
        load_config(child)
    assert ".." not in str(caught.value)


def test_the_command_line_prints_each_mistake_on_its_line(write, capsys):
    path = write(BASE.replace("seed: 7", "sed: 7\nrun_dir: ''"))
    assert main(["train", str(path), "--logging.samples", "maybe"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        f"ultravox: error: {path}:2: unknown key 'sed'; did you mean 'seed'?",
        f"  {path}:3: run_dir: expected a text that is not empty, got ''; without the key it is runs/<name of the YAML "
        "file>",
        "  command line: --logging.samples: expected true or false, got 'maybe'",
    ]
