"""Projectors made of the language model's rows: a run, its checkpoint, and every way to ask it."""

import json

import numpy as np
import pytest
import torch
import yaml
from tiny_run import tiny_config

from ultravox.audio.waveform import load_waveform
from ultravox.config.load import parse_config
from ultravox.config.schema import RunConfig
from ultravox.data.prompts import render_prompt, user_message
from ultravox.errors import ConfigError, DataError
from ultravox.inference.conversation import Conversation
from ultravox.inference.generate import Decoding, answer_batch
from ultravox.model.factory import load_model
from ultravox.training.batches import SpeechBatch
from ultravox.training.run import run_training

KINDS = ("ctc_weighted", "ctc_compressed")


@pytest.fixture(scope="module", params=KINDS)
def trained(request, parts, tmp_path_factory):
    """A run of both stages, its model and its recordings."""
    (llama, whisper), tones = parts
    run_dir = tmp_path_factory.mktemp("ctc") / request.param
    content = tiny_config((llama, whisper), tones, run_dir).model_dump(mode="json")
    content["model"]["projector"] = request.param
    for stage, steps in zip(content["stages"], (60, 8), strict=True):
        stage |= {"max_steps": steps, "accumulation_steps": 1}
    run = run_training(RunConfig.model_validate(content))
    clips = [load_waveform(path) for path in sorted((tones / "audio").glob("*.wav"))[:3]]
    return run, *load_model(run), clips


def test_a_run_learns_and_its_rows_are_saved(trained):
    run, model, _, _ = trained
    stages = json.loads((run / "train.json").read_text())["stages"]
    assert [stage["skipped_steps"] for stage in stages] == [0, 0]
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["stage"] == "align" and "loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    config = json.loads((run / "model" / "config.json").read_text())
    projector = model.multi_modal_projector
    assert 0 < config["num_projector_rows"] == len(projector.token_ids) < model.config.text_config.vocab_size
    assert (projector.token_ids.diff() > 0).all()


def compressed(model, batch):
    """The positions of each clip, as the model hears them."""
    with torch.no_grad():
        return model.project(*model.encode_audio(batch["audio_values"], batch["audio_lens"]))[1].tolist()


def test_every_way_to_ask_gives_the_same(trained):
    """In a batch with padding and alone; transformers' loop and ours; the whole dialogue at once and turn by turn."""
    _, model, processor, clips = trained
    text = render_prompt(processor.tokenizer, [user_message("Transcribe")])
    batch = processor(text=[text] * 3, audio=clips)
    counts = compressed(model, batch)
    planned = batch["audio_token_len"].tolist()
    if model.multi_modal_projector.compresses:
        assert counts != planned
        assert all(0 < count <= most for count, most in zip(counts, planned, strict=True))
    else:
        assert counts == planned
    together = answer_batch(model, processor, clips, prompt="Transcribe", max_new_tokens=6)
    theirs = model.generate(**batch, max_new_tokens=6, do_sample=False)[:, batch["input_ids"].shape[1] :]
    said = [found.strip() for found in processor.batch_decode(theirs, skip_special_tokens=True)]
    assert said == together
    for clip, expected in zip(clips, together, strict=True):
        assert answer_batch(model, processor, [clip], prompt="Transcribe", max_new_tokens=6) == [expected]

    with torch.no_grad():
        alone = model(**processor(text=text, audio=clips[0])).logits[0, -1]
        in_batch = model(**batch).logits[0, -1]
    torch.testing.assert_close(in_batch, alone, atol=1e-4, rtol=1e-3)


def test_logits_are_those_of_a_row_with_only_what_is_heard(trained):
    """No placeholder too many: the language model alone, given the found positions between the text's rows."""
    _, model, processor, clips = trained
    batch = processor(text="Say<|audio|>now", audio=[clips[0]])
    ids = batch["input_ids"][0]
    is_audio = ids == processor.audio_token_index
    first, last = int(is_audio.int().argmax()), len(ids) - int(is_audio.flip(0).int().argmax())
    with torch.no_grad():
        heard, counts = model.project(*model.encode_audio(batch["audio_values"], batch["audio_lens"]))
        table = model.get_input_embeddings()
        row = torch.cat([table(ids[:first]), heard[0, : int(counts[0])], table(ids[last:])])
        plain = model.language_model(inputs_embeds=row[None]).logits[0, -1]
        torch.testing.assert_close(model(**batch).logits[0, -1], plain, atol=1e-4, rtol=1e-3)


def test_a_conversation_from_the_cache_is_the_one_read_anew(trained):
    _, model, processor, clips = trained
    talk = Conversation(model, processor, decoding=Decoding(4))
    answers = ["".join(talk.say("and?", [clip])) for clip in clips[:2]]
    assert talk.num_cached
    again = Conversation(model, processor, decoding=Decoding(4))
    list(again.say("and?", [clips[0]]))
    again._forget_cache()
    assert "".join(again.say("and?", [clips[1]])) == answers[1]


@pytest.mark.parametrize("trained", ["ctc_compressed"], indirect=True)
def test_generate_does_not_go_on_from_a_cache_that_it_cannot_count(trained):
    _, model, processor, clips = trained
    batch = processor(text="a<|audio|>b", audio=clips[0])
    with pytest.raises(DataError, match="Conversation"):
        model.generate(**batch, past_key_values=object(), max_new_tokens=2)


def test_a_batch_counts_what_its_windows_have():
    nothing = torch.zeros(0)
    lists = {name: [] for name in ("uids", "sources", "input_ids", "supervised", "transcripts")}
    batch = SpeechBatch(
        **lists,
        ids=["two", "none", "one"],
        audio_tokens=[[7, 3], [], [5]],
        num_windows=[3, 0, 1],
        values=nothing,
        lengths=nothing,
        encoded=True,
        seconds=[],
        faults=[],
    )
    assert batch.with_positions([4, 3, 3, 5], [2, 1, 3, 4]).audio_tokens == [[3, 3], [], [4]]
    for planned in ([4, 4, 3, 5], [4, 3, 3]):
        with pytest.raises(DataError, match="its windows have"):
            batch.with_positions(planned, planned)


@pytest.mark.parametrize("kind", KINDS)
def test_both_stages_run_in_16_bits(kind, parts, tmp_path):
    content = tiny_config(*parts, tmp_path / "run").model_dump(mode="json")
    content["model"] |= {"projector": kind, "dtype": "bfloat16"}
    for stage in content["stages"]:
        stage |= {"max_steps": 4, "accumulation_steps": 1}
    run = run_training(RunConfig.model_validate(content))
    stages = json.loads((run / "train.json").read_text())["stages"]
    assert [(stage["steps"], stage["skipped_steps"]) for stage in stages] == [(4, 0), (4, 0)]
    model, processor = load_model(run)
    batch = processor(text="a<|audio|>b", audio=load_waveform(next(iter((parts[1] / "audio").glob("*.wav")))))
    with torch.no_grad():
        assert torch.isfinite(model(**batch).logits).all()


@pytest.mark.parametrize(
    ("stage", "named"),
    [
        ({"tune": {"next_frame": {"weight": 0.1, "mask_share": 0.2}}}, "tune.next_frame.weight"),
        ({"tune": {"end_of_audio": {"variant": "head", "weight": 0.3}}}, "tune.end_of_audio.variant"),
        ({"max_batch_memory_gb": 3}, "max_batch_memory_gb"),
    ],
)
def test_what_counts_positions_beforehand_is_refused(stage, named, parts, tmp_path):
    content = tiny_config(*parts, tmp_path).model_dump(mode="json")
    content["model"]["projector"] = "ctc_compressed"
    content["stages"][1] |= stage
    with pytest.raises(ConfigError, match=f"(?s){named}.*one position of each run"):
        parse_config(yaml.safe_dump(content))
    content["model"]["projector"] = "ctc_weighted"
    parse_config(yaml.safe_dump(content))


def test_silence_keeps_a_position(trained):
    _, model, processor, _ = trained
    batch = processor(text="a<|audio|>b", audio=np.zeros(16000, np.float32))
    assert compressed(model, batch)[0] >= 1
    with torch.no_grad():
        assert torch.isfinite(model(**batch).logits).all()
