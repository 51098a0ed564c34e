"""End of audio and next frames in the task and in whole runs."""

import json
import shutil

import numpy as np
import pytest
import torch
from tiny_run import tiny_config

import ultravox
from ultravox.config.schema import RunConfig
from ultravox.data.order import Position
from ultravox.errors import CheckpointError, ConfigError, DataError
from ultravox.model.factory import build_model, build_processor, load_model
from ultravox.objectives.end_of_audio import StopHead
from ultravox.training.heads import load_stop_head
from ultravox.training.rows import load_within
from ultravox.training.run import run_training
from ultravox.training.speech import prepare_speech
from ultravox.training.speech_task import SpeechTask
from ultravox.training.tune import TuneTask


def config_of(parts, run_dir, tune, **changes):
    content = tiny_config(*parts, run_dir).model_dump(mode="json")
    (stage,) = content["stages"] = content["stages"][1:]
    stage["max_steps"], stage["optim"]["warmup_steps"] = 3, 1
    stage["tune"], stage["augment"] = tune, {}
    stage.update(changes)
    return RunConfig.model_validate(content)


def make_task(config):
    torch.manual_seed(0)
    model, processor = build_model(config.model), build_processor(config.model)
    task = TuneTask(model, processor, prepare_speech(config, model, processor), config.stages[0], 1)
    task.train_mode()
    return task


def rows_of(run_dir):
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


EARLY = {"end_of_audio": {"variant": "early", "end_text": "yes", "middle_text": "no", "last_positions": 2}}
HEAD = {"end_of_audio": {"variant": "head"}}
LATE = {"end_of_audio": {"variant": "late", "end_suffix": " yes", "cut_text": "no"}}
NEXT = {"next_frame": {"weight": 0.5, "mask_share": 0.4, "mask_positions": 2}}


def test_some_clips_are_cut_and_say_nothing_of_their_text(parts, tmp_path):
    task = make_task(config_of(parts, tmp_path, HEAD))
    batch = task.batch()
    assert not task.data.uses_cache(task.stage)
    assert len(batch.whole) == len(batch.ids)
    assert 0 < sum(batch.whole) < len(batch.whole)
    lengths = dict(zip(batch.ids, batch.seconds, strict=True))
    plain = SpeechTask.make_batch(task, task.order.batch(0, 0, 0), Position())
    for row, whole in enumerate(batch.whole):
        assert batch.supervised[row].any() == whole
        assert np.array_equal(plain.input_ids[row], batch.input_ids[row])
    again = task.batch()
    assert again.whole == batch.whole
    assert dict(zip(again.ids, again.seconds, strict=True)) == lengths


def test_a_late_answer_says_whether_the_clip_is_whole(parts, tmp_path):
    task = make_task(config_of(parts, tmp_path, LATE))
    batch, found = SpeechTask.make_batch(task, task.order.batch(0, 0, 0), Position()), task.batch()
    for row, whole in enumerate(batch.whole):
        before = task.tokenizer.decode(batch.input_ids[row][batch.supervised[row]])
        after = task.tokenizer.decode(found.input_ids[row][found.supervised[row]])
        answer, end = before.split("<|im_end|>")
        assert after == f"{answer} yes<|im_end|>{end}" if whole else f"no<|im_end|>{end}"
        kept = found.input_ids[row][~found.supervised[row]]
        assert np.array_equal(kept, batch.input_ids[row][~batch.supervised[row]])
    assert max(map(len, found.input_ids)) <= int(task.text_tokens.max()) + 1


@pytest.mark.parametrize("packing", ["on", "off"])
@pytest.mark.parametrize("tune", [EARLY, HEAD, NEXT], ids=["early", "head", "next"])
def test_states_are_those_of_the_audio(parts, tmp_path, tune, packing):
    """Packed or not, the states handed to an objective are those of each row by itself, in the order of the rows."""
    task = make_task(config_of(parts, tmp_path, tune, packing=packing))
    batch = task.batch()
    with torch.no_grad():
        found = task._of_audio(task._states(batch, training=True))
        audio, counts = task.audio_embeddings(batch, augmented=False)
        expected = []
        for row, ids in enumerate(batch.input_ids):
            repeats = np.where(ids == task.audio_token_id, int(counts[row]), 1)
            whole = torch.from_numpy(np.repeat(ids, repeats))[None]
            inputs = task.model.embed(whole, audio[row : row + 1], counts[row : row + 1])
            hidden = task.model.get_decoder()(inputs_embeds=inputs).last_hidden_state[0]
            expected.append(hidden[whole[0] == task.audio_token_id])
    assert torch.allclose(found, torch.cat(expected), atol=1e-4)


def test_early_is_the_language_models_own_words(parts, tmp_path):
    task = make_task(config_of(parts, tmp_path, EARLY))
    batch = task.batch()
    with torch.no_grad():
        states = task._of_audio(task._states(batch, training=True))
        total, count, means = task.ending.loss(states, batch)
        log_probs = task.model.logits_of(states).log_softmax(-1)
    yes, no = (task.tokenizer.encode(word, add_special_tokens=False)[0] for word in ("yes", "no"))
    targets = []
    for row, whole in enumerate(batch.whole):
        positions = sum(batch.audio_tokens[row])
        end = min(2, positions) if whole else 0
        targets += [no] * (positions - end) + [yes] * end
    assert count == len(targets) == len(states)
    assert total.item() == pytest.approx(-log_probs[torch.arange(count), targets].sum().item(), rel=1e-4)
    assert means["end_of_audio"] == (total.item(), count)


def test_a_batch_counts_tokens_and_positions_by_their_weights(parts, tmp_path):
    tune = {"end_of_audio": {"variant": "head", "weight": 0.25}}
    task = make_task(config_of(parts, tmp_path, tune))
    batch = task.batch()
    output = task._loss(task.batch())
    tokens = sum(int(supervised.sum()) for supervised in batch.supervised)
    positions = sum(sum(row) for row in batch.audio_tokens)
    assert output.count == pytest.approx(tokens + 0.25 * positions)
    alone = make_task(config_of(parts, tmp_path, {**tune, "cross_entropy_weight": 0.0}))._loss(task.batch())
    assert alone.count == pytest.approx(0.25 * positions)
    assert alone.predictions is None


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("tune", [EARLY, HEAD], ids=["early", "head"])
def test_a_batch_of_cut_clips_alone_and_one_of_texts_alone(parts, tmp_path, tune, smoothing):
    """Nothing is supervised in the one, nothing is heard in the other."""
    task = make_task(config_of(parts, tmp_path, {**tune, "label_smoothing": smoothing}))
    batch = task.batch()
    cut = [row for row, whole in enumerate(batch.whole) if not whole]
    rows = [batch._part(slice(row, row + 1), slice(row, row + 1), row) for row in cut]
    for row in rows:
        output = task._loss(row)
        assert output.count == sum(map(sum, row.audio_tokens))
        output.sum.backward()
        assert torch.isfinite(output.sum)
    (text,) = [batch._part(slice(row, row + 1), slice(0, 0), row) for row in [batch.whole.index(True)]]
    text.input_ids = [ids[ids != task.audio_token_id] for ids in text.input_ids]
    text.supervised = [np.arange(len(ids)) > 3 for ids in text.input_ids]
    text.audio_tokens = [[]]
    output = task._loss(text)
    assert output.count == output.predictions.num_positions > 0
    assert torch.isfinite(output.sum)


def test_what_is_hidden_is_not_heard(parts, tmp_path):
    """The hidden part's content changes neither the encoder's input nor, so, anything that is computed from it."""
    task = make_task(config_of(parts, tmp_path, NEXT))
    batch = task.batch()
    masked, hidden = task.next_frames.hide(batch)
    steps = 2 * task.model.config.stack_factor
    changed = batch.values.clone()
    start = 0
    for row, count in enumerate(hidden.counts.tolist()):
        for position in hidden.mask[start : start + count].nonzero().squeeze(1).tolist():
            stretch = changed[row, position * steps : (position + 1) * steps]
            stretch.copy_(stretch.flip(0) * 0.9 + 0.01)
        changed[row].clamp_(min=float(batch.values[row].min()))
        start += count
    assert not torch.equal(changed, batch.values)
    batch.values = changed
    again, other = task.next_frames.hide(batch)
    assert torch.equal(again.values, masked.values)
    assert torch.equal(other.mask, hidden.mask)
    assert not torch.equal(other.targets[other.mask], hidden.targets[hidden.mask])
    assert hidden.mask.float().mean() > 0.2
    shown = ~hidden.mask
    assert torch.equal(other.targets[shown], hidden.targets[shown])


def test_targets_are_the_positions_own_spectrogram(parts, tmp_path):
    task = make_task(config_of(parts, tmp_path, NEXT))
    batch = task.batch()
    _, hidden = task.next_frames.hide(batch)
    steps, row = 2 * task.model.config.stack_factor, batch.values[0]
    second = row[steps : 2 * steps].reshape(-1)
    expected = (second - second.mean()) / (second.var(unbiased=False) + 1e-5).sqrt()
    assert torch.allclose(hidden.targets[1], expected, atol=1e-5)


def test_encoder_targets_are_of_the_audio_as_it_is(parts, tmp_path):
    tune = {"next_frame": {**NEXT["next_frame"], "target": "encoder", "form": "contrastive", "num_negatives": 5}}
    task = make_task(config_of(parts, tmp_path, tune))
    batch = task.batch()
    _, hidden = task.next_frames.hide(batch)
    stack = task.model.config.stack_factor
    with torch.no_grad():
        frames, lengths = task.model.encode_audio(batch.values.transpose(1, 2), batch.lengths)
    groups = frames[0, : int(lengths[0])].split(stack)
    expected = torch.nn.functional.layer_norm(torch.stack([group.mean(0) for group in groups]), (frames.shape[-1],))
    assert torch.allclose(hidden.targets[: len(groups)], expected, atol=1e-5)


@pytest.mark.parametrize("tune", [EARLY, HEAD, LATE], ids=["early", "head", "late"])
def test_runs_that_learn_the_end(parts, tmp_path, tune):
    config = config_of(parts, tmp_path / "run", tune)
    run_training(config)
    rows = rows_of(tmp_path / "run")
    (look,) = [row for row in rows if "end_of_audio_accuracy" in row]
    assert 0 <= look["end_of_audio_accuracy"] <= 1
    assert 0.5 <= look["end_of_audio_length_only_accuracy"] <= 1
    if tune is not LATE:
        assert {f"end_of_audio_missed_at_{rate}" for rate in (1, 5, 10)} <= look.keys()
        assert all(0 <= row["end_of_audio_position_accuracy"] <= 1 for row in rows if "loss" in row)
    model, _ = load_model(tmp_path / "run")
    if tune is not HEAD:
        with pytest.raises(CheckpointError, match="holds no stop head"):
            load_stop_head(tmp_path / "run", "tune")
        return
    head = load_stop_head(tmp_path / "run", "tune")
    assert head.linear.weight.abs().max() > 0
    states = torch.randn(4, model.config.text_config.hidden_size)
    expected = states @ head.linear.weight[0] + head.linear.bias
    assert torch.allclose(head(states), expected, atol=1e-6)

    loaded = ultravox.load(tmp_path / "run")
    task = TuneTask(*load_model(tmp_path / "run"), prepare_speech(config, model, loaded.processor), config.stages[0], 1)
    task.model.eval()
    for example in task.data.progress_examples[:3]:
        with torch.no_grad():
            trained = task._of_audio(task._states(task.first_versions([example]), training=False))
            expected = torch.sigmoid(head(trained)).numpy()
        scores = loaded.score_speech_end(load_within(example.recordings[0], 0.1, 30), head)
        assert scores == pytest.approx(expected, abs=1e-5)
        assert ((scores > 0) & (scores < 1)).all()
    with pytest.raises(DataError, match=r"reads states of 5, but this model has"):
        loaded.score_speech_end(np.ones(16000, np.float32), StopHead(5, 1.0))

    weight = float(head.positive_weight)  # three or so positions a clip, half of the clips whole, one of them the end
    assert 3 < weight < 30


@pytest.mark.parametrize("form", ["regression", "contrastive"])
def test_runs_that_predict_what_comes(parts, tmp_path, form):
    tune = {"next_frame": {**NEXT["next_frame"], "form": form, "weight": 1.0}}
    config = config_of(parts, tmp_path / "run", tune, max_steps=30)
    config.stages[0].optim.lr.projector = 1e-2
    run_training(config)
    rows = [row for row in rows_of(tmp_path / "run") if "loss" in row]
    assert np.mean([row["next_frame"] for row in rows[-5:]]) < np.mean([row["next_frame"] for row in rows[:5]])
    skills = [1 - row["next_frame"] / row["next_frame_copied"] for row in rows]
    assert [row["next_frame_skill"] for row in rows] == pytest.approx(skills, abs=1e-4)


def test_a_run_resumes_exactly(parts, tmp_path):
    tune = {**HEAD, "next_frame": {**NEXT["next_frame"]}}
    run_training(config_of(parts, tmp_path / "whole", tune, max_steps=4, checkpoint_every=2))
    first = tmp_path / "whole" / "checkpoints"
    assert first.is_dir()
    names = sorted(path.name for path in first.iterdir())
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / names[-1])
    config = config_of(parts, tmp_path / "again", tune, max_steps=4, checkpoint_every=2)
    run_training(config, resume=True)
    keys = ("step", "loss", "end_of_audio", "next_frame")
    found = [
        [[row[key] for key in keys] for row in rows_of(tmp_path / name) if "loss" in row] for name in ("whole", "again")
    ]
    assert found[0] == found[1]
    assert len(found[0]) == 4


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ({"end_of_audio": {"variant": "head", "cut_share": 0}}, "no negatives: set cut_share"),
        ({"end_of_audio": {"variant": "head", "cut_share": 1}}, "no whole clip"),
        ({"end_of_audio": {"variant": "early"}, "distillation": {"weight": 1}}, "cuts clips: use one of them"),
        ({"end_of_audio": {"last_positions": 3}}, "no effect while end_of_audio.variant is 'none'"),
        ({"next_frame": {"weight": 1}}, "hear both ways.*set mask_share"),
        ({"cross_entropy_weight": 0, "end_of_audio": {"variant": "late"}}, "nothing is learnt of the text"),
    ],
)
def test_what_cannot_go_together_is_refused(parts, tmp_path, tune, message):
    with pytest.raises(ValueError, match=message):
        config_of(parts, tmp_path, tune)


def test_texts_of_several_tokens_and_targets_that_move_are_refused(parts, tmp_path):
    with pytest.raises(ConfigError, match=r"end_of_audio.end_text 'one two' is \d tokens"):
        make_task(config_of(parts, tmp_path, {"end_of_audio": {"variant": "early", "end_text": "one two"}}))
    config = config_of(parts, tmp_path, {"next_frame": {**NEXT["next_frame"], "target": "encoder"}})
    content = config.model_dump(mode="json")
    content["model"]["train_audio_encoder"] = True
    with pytest.raises(ValueError, match="needs a frozen audio encoder"):
        RunConfig.model_validate(content)
    config.model.train_audio_encoder = True  # one that no file can hold
    with pytest.raises(ConfigError, match="needs a frozen audio encoder"):
        make_task(config)


def test_what_a_later_stage_cannot_do_is_found_before_the_first(parts, tmp_path):
    content = tiny_config(*parts, tmp_path / "run").model_dump(mode="json")
    content["stages"][1]["tune"] = {"end_of_audio": {"variant": "early", "end_text": "one two"}}
    with pytest.raises(ConfigError, match=r"end_of_audio.end_text 'one two' is \d tokens"):
        run_training(RunConfig.model_validate(content))
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_the_cross_entropy_is_told_apart_from_what_is_learnt_beside_it(parts, tmp_path):
    for name, tune in (("head", HEAD), ("next", NEXT), ("late", LATE)):
        run_training(config_of(parts, tmp_path / name, tune, max_steps=2))
        for row in (row for row in rows_of(tmp_path / name) if "loss" in row):
            assert ("cross_entropy" in row) == (name != "late")
            entropy = row.get("cross_entropy", row["loss"])
            assert row["perplexity"] == pytest.approx(np.exp(entropy), rel=1e-4)
            assert name == "late" or row["cross_entropy"] != row["loss"]
