"""Reading shell texts: what they train, and what is wrong with them."""

import shlex

import pytest

from ultravox.clusters.training_command import find_mistakes, find_training_calls

LOOK = 'set -- "$run"/checkpoints/*-*; if [ -e "$1" ]; then resume=--resume; else resume=; fi; '


def test_the_call_is_found_among_other_commands():
    text = (
        'export A="x y"; cd z && exec python -m ultravox train "configs/a b.yaml" --seed 3'
        ' --run_dir "${{outputs.runs}}/a" $r'
        " # ultravox train nothing.yaml"
    )
    (call,) = find_training_calls(text)
    assert call.config == "configs/a b.yaml"
    assert call.words == ("--seed", "3", "--run_dir", "${{outputs.runs}}/a", "$r")
    assert call.overrides == ["--seed", "3", "--run_dir", "${{outputs.runs}}/a"]
    assert not call.torchrun


@pytest.mark.parametrize(
    ("text", "torchrun", "through_script"),
    [
        ("torchrun --nproc-per-node=8 -m ultravox train c.yaml", True, False),
        ("python -m torch.distributed.run --standalone -m ultravox train c.yaml", True, False),
        ("srun bash launch/torchrun.sh c.yaml", True, True),
        (".venv/bin/ultravox train c.yaml", False, False),
        ("torchrun \\\n    --standalone \\\n    -m ultravox train c.yaml", True, False),
    ],
)
def test_who_starts_the_processes(text, torchrun, through_script):
    (call,) = find_training_calls(text)
    assert (call.config, call.torchrun, call.through_script) == ("c.yaml", torchrun, through_script)


def test_what_a_variable_holds_is_no_override():
    (call,) = find_training_calls('ultravox train c.yaml --seed $SEED --run_dir "$run" "$@" "${resume[@]}" --resume')
    assert call.overrides == []


def test_other_words_are_no_call():
    assert find_training_calls("echo ultravox; ultravox evaluate train; train ultravox") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("python train.py", "runs no `ultravox train CONFIG`"),
        ("echo 'ultravox", "no shell text"),
        (LOOK + "ultravox train --run_dir r $resume", "names no config before --run_dir"),
        (LOOK + "ultravox train; ls --run_dir", "names no config before its end"),
        (LOOK + "ultravox train configs/none.yaml --run_dir r $resume", "configs/none.yaml, which is not in"),
        (LOOK + "ultravox train configs/quickstart.yaml --run_dir r --sed 3 $resume", "did you mean"),
        (LOOK + "ultravox train configs/quickstart.yaml --seed x --run_dir r $resume", "--seed"),
        (LOOK + "ultravox train configs/quickstart.yaml $resume", "has no --run_dir"),
        ("ultravox train configs/quickstart.yaml --run_dir r --resume", "--resume stands there in any case"),
        ("ultravox train configs/quickstart.yaml --run_dir r", "never passes --resume"),
    ],
)
def test_mistakes(text, message, root):
    mistakes = find_mistakes(text, root)
    assert any(message in mistake for mistake in mistakes), mistakes


def test_a_good_text_has_none(root):
    assert find_mistakes(LOOK + "ultravox train configs/quickstart.yaml --seed 3 --run_dir r $resume", root) == []
    assert find_mistakes("ultravox train configs/quickstart.yaml --run_dir=r", root, resumes=False) == []


def test_a_run_folder_with_spaces_stays_one_word():
    run = "${{outputs.runs}}/my run"
    (call,) = find_training_calls(f"ultravox train c.yaml --run_dir {shlex.quote(run)}")
    assert call.words == ("--run_dir", run)
