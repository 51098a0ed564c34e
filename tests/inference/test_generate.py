"""Decoding: batches, streams and conversations say the same, and compute nothing twice."""

import numpy as np
import pytest
import torch

import ultravox
from ultravox.audio.waveform import write_waveform
from ultravox.data.prompts import render, render_prompt, user_message
from ultravox.errors import AudioError, DataError
from ultravox.inference.api import Ultravox
from ultravox.inference.generate import Decoding, answer_batch, generate_tokens, stream_answer, stream_text, transcribe


@pytest.fixture
def talker(tiny_model, tiny_processor):
    """The tiny model, with weights large enough that sounds change its words, writing letters only (not any byte)."""
    tower, text = tiny_model.audio_tower, tiny_model.language_model.model
    with torch.no_grad():
        tiny_model.multi_modal_projector.linear_2.weight.mul_(20)
        for layer in (tower.conv1, tower.conv2, *(layer.self_attn.o_proj for layer in text.layers)):
            layer.weight.mul_(10)
    silenced = torch.ones(259, dtype=torch.bool)
    silenced[tiny_processor.tokenizer.encode("abcdefghijklmnopqrstuvwxyz<|im_end|>", add_special_tokens=False)] = False
    tiny_model.language_model.register_forward_hook(
        lambda module, args, output: setattr(output, "logits", output.logits.masked_fill(silenced, -torch.inf))
    )
    return Ultravox(tiny_model, tiny_processor)


def waveforms(*seconds):
    """Different tones, so that they are different sounds even to an untrained encoder."""
    return [
        (0.3 * np.sin(np.arange(round(s * 16000)) * (0.02 + 0.11 * index))).astype(np.float32)
        for index, s in enumerate(seconds)
    ]


def test_batches_equal_single_clips_and_keep_the_order(talker):
    clips = waveforms(0.3, 1.2, 0.5, 0.9, 0.4)
    together = transcribe(talker.model, talker.processor, clips, batch_size=3, max_new_tokens=12)
    alone = [transcribe(talker.model, talker.processor, [clip], max_new_tokens=12)[0] for clip in clips]
    assert together == alone
    assert len(set(together)) > 1, "all answers are alike, so the order was not tested"
    assert transcribe(talker.model, talker.processor, []) == []


def test_waveforms_of_integers_are_scaled(talker):
    (clip,) = waveforms(0.7)
    integers = np.round(clip * 32768).astype(np.int16)
    assert talker.transcribe(integers, max_new_tokens=12) == talker.transcribe(clip, max_new_tokens=12)
    with pytest.raises(AudioError, match=r"one axis, \[sample\] at 16 kHz, but this one is \(2, 100\)"):
        talker.ask(np.zeros((2, 100), np.float32))
    with pytest.raises(AudioError, match="floats or signed integers, but this one holds uint8"):
        talker.ask(np.zeros(100, np.uint8))


def test_loop_equals_hugging_faces(talker):
    text = render_prompt(talker.processor.tokenizer, [user_message("Transcribe")])
    batch = talker.processor(text=text, audio=waveforms(0.7))
    expected = talker.model.generate(**batch, max_new_tokens=15, do_sample=False)[0, batch["input_ids"].shape[1] :]
    embeddings, _ = talker.model.hear_prompt(**batch)
    steps = generate_tokens(talker.model, embeddings, batch["attention_mask"], Decoding(15))
    assert [step[0][1] for step in steps] == expected.tolist()


def test_rows_that_have_ended_leave_the_batch(talker):
    """Every token of one row becomes an end token; the other row goes on as if alone."""
    tokenizer = talker.processor.tokenizer
    text = render_prompt(tokenizer, [user_message()])
    clips = waveforms(0.5, 0.8)

    def tokens(selected):
        batch = talker.processor(text=[text] * len(selected), audio=selected)
        embeddings, _ = talker.model.hear_prompt(**batch)
        rows: dict[int, list[int]] = {}
        sizes = []
        for step in generate_tokens(talker.model, embeddings, batch["attention_mask"], Decoding(8)):
            sizes.append(len(step))
            for row, token in step:
                rows.setdefault(row, []).append(token)
        return rows, sizes

    talker.model.generation_config.eos_token_id = []
    first, second = tokens([clips[0]])[0][0], tokens([clips[1]])[0][0]
    assert first != second
    ends = next(token for token in first if token not in second)
    talker.model.generation_config.eos_token_id = [ends]
    rows, sizes = tokens(clips)
    assert rows[0] == first[: first.index(ends) + 1]
    assert rows[1] == second
    assert sizes[-1] == 1


def test_a_transcript_that_repeats_itself_ends_there_and_leaves_the_batch(talker, monkeypatch):
    """The tiny model is made to say three letters over and over; the other row goes on as if alone."""
    tokenizer = talker.processor.tokenizer
    circle = tokenizer.encode("abc", add_special_tokens=False)
    sizes = []

    def steps(model, embeddings, mask, decoding, cache=None, stopped=()):
        for number in range(decoding.max_new_tokens):
            rows = [row for row in range(len(embeddings)) if row not in stopped]
            sizes.append(len(rows))
            words = {0: circle[number % 3], 1: tokenizer.encode(chr(97 + number), add_special_tokens=False)[0]}
            yield [(row, words[row]) for row in rows]

    monkeypatch.setattr("ultravox.inference.generate.generate_tokens", steps)
    clips = waveforms(4.0, 4.0)
    assert transcribe(talker.model, talker.processor, clips, max_new_tokens=20) == ["abc", "abcdefghijklmnopqrst"]
    assert sizes == [2] * 12 + [1] * 8
    assert answer_batch(talker.model, talker.processor, clips, max_new_tokens=20)[0] == "abcabcabcabcabcabcab"


def test_rows_that_the_caller_stops_leave_the_batch(talker):
    talker.model.generation_config.eos_token_id = []
    clips = waveforms(0.5, 0.8, 0.4)
    text = render_prompt(talker.processor.tokenizer, [user_message()])
    batch = talker.processor(text=[text] * 3, audio=clips)
    embeddings, _ = talker.model.hear_prompt(**batch)
    alone: dict[int, list[int]] = {}
    for step in generate_tokens(talker.model, embeddings, batch["attention_mask"], Decoding(8)):
        for row, token in step:
            alone.setdefault(row, []).append(token)
    stopped: set[int] = set()
    rows: dict[int, list[int]] = {}
    for step in generate_tokens(talker.model, embeddings, batch["attention_mask"], Decoding(8), stopped=stopped):
        for row, token in step:
            rows.setdefault(row, []).append(token)
        if len(rows[1]) == 3:
            stopped.add(1)
    assert rows == {0: alone[0], 1: alone[1][:3], 2: alone[2]}


def test_sampling_is_repeatable_and_top_p_narrows(talker):
    clip = waveforms(0.5)
    answers = [talker.ask(clip, temperature=2.0, seed=seed, max_new_tokens=20) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
    assert talker.ask(clip, temperature=2.0, top_p=1e-9, max_new_tokens=9) == talker.ask(clip, max_new_tokens=9)
    with pytest.raises(DataError, match="top_p"):
        talker.ask(clip, top_p=0.0)


def test_stream_equals_batch(talker):
    clip = waveforms(0.6)
    pieces = list(talker.ask(clip, "Transcribe", stream=True, max_new_tokens=30))
    batch = answer_batch(talker.model, talker.processor, clip, prompt="Transcribe", max_new_tokens=30)
    assert "".join(pieces).strip() == batch[0]
    assert len(pieces) > 1


def test_characters_of_several_bytes_are_held_back(tiny_processor):
    tokens = tiny_processor.tokenizer.encode("aé☺b", add_special_tokens=False)
    assert len(tokens) == 7
    assert list(stream_text(tiny_processor.tokenizer, tokens)) == ["a", "é", "☺", "b"]
    assert "".join(stream_text(tiny_processor.tokenizer, tokens[:2])) == "a\N{REPLACEMENT CHARACTER}"


def test_counts_are_checked_before_anything_is_computed(talker):
    with pytest.raises(DataError, match=r"2 <\|audio\|> placeholders, 1 audio clips"):
        talker.ask(waveforms(0.5), "<|audio|> and <|audio|>")
    with pytest.raises(DataError, match=r"1 <\|audio\|> placeholders, 0 audio clips"):
        stream_answer(talker.model, talker.processor, [user_message("<|audio|>")], [])


def test_too_long_for_the_context(talker):
    with pytest.raises(DataError, match="exceed the language model's 1024"):
        talker.ask(waveforms(1.0), max_new_tokens=1020)


def computed_lengths(model):
    """Positions that each forward pass of the language model computes, as a list that fills."""
    lengths: list[int] = []
    model.language_model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    return lengths


def test_conversation_computes_new_tokens_only(talker):
    talker.model.generation_config.eos_token_id = []
    one, two = waveforms(0.5, 0.7)
    chat = talker.conversation(decoding=Decoding(6))
    lengths = computed_lengths(talker.model)
    first = "".join(chat.say("Hello", [one]))
    cached = chat.num_cached
    assert cached == lengths[0] + 5  # the last token was written but not read
    lengths.clear()
    second = "".join(chat.say("And this?", [two]))
    new = talker.processor.tokenizer.encode(
        "<|im_end|>\n<|im_start|>user\nAnd this?<|im_end|>\n<|im_start|>assistant\n"
    )
    last_token = 1
    assert lengths[0] == last_token + len(new) + sum(talker.processor.window_tokens(len(two)))
    assert chat.num_cached == cached + sum(lengths)

    # the same answer as from reading the whole dialogue anew
    messages = [user_message("Hello", 1), {"role": "assistant", "content": first}, user_message("And this?", 1)]
    again = stream_answer(talker.model, talker.processor, messages, [one, two], Decoding(6))
    assert "".join(again) == second


def test_second_turns_audio_is_heard(talker):
    one, two, three = waveforms(0.5, 0.5, 0.5)

    def second_logits(audio):
        chat = talker.conversation(decoding=Decoding(4))
        list(chat.say("", [one]))
        kept = []
        hook = talker.model.language_model.register_forward_hook(lambda *args: kept.append(args[-1].logits))
        list(chat.say("", [audio]))
        hook.remove()
        return kept[0]

    assert (second_logits(two) - second_logits(three)).nan_to_num().abs().max() > 1e-2
    torch.testing.assert_close(second_logits(two), second_logits(two))


def test_conversation_after_errors_interruptions_and_reset(talker):
    clip = waveforms(0.5)
    talker.model.generation_config.eos_token_id = []
    chat = talker.conversation(system="Be brief.", decoding=Decoding(8))
    with pytest.raises(DataError, match="placeholders"):
        chat.say("<|audio|>")
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
    answer = chat.say("", clip)
    said = next(answer) + next(answer)
    answer.close()  # Ctrl-C
    assert chat.messages[-1] == {"role": "assistant", "content": said}
    rest = "".join(chat.say("Go on"))
    messages = [*chat.messages[:-1]]
    assert "".join(stream_answer(talker.model, talker.processor, messages, clip, Decoding(8))) == rest
    chat.reset()
    assert chat.num_cached == 0
    assert len(chat.messages) == 1


@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize("passes", [0, 3])
def test_ctrl_c_inside_a_forward_pass(talker, layer, passes):
    """Some layers of the cache hold the last token then, others do not; the dialogue goes on as if read anew."""
    talker.model.generation_config.eos_token_id = []
    one, two = waveforms(0.5, 0.7)
    left = passes

    def interrupt(*_):
        nonlocal left
        left -= 1
        if left == -1:
            raise KeyboardInterrupt

    chat = talker.conversation(decoding=Decoding(8))
    hook = talker.model.language_model.model.layers[layer].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(chat.say("Hello", [one]))
    hook.remove()
    assert len(chat.messages) == (2 if passes else 0), "a turn without any answer is not kept"
    history = list(chat.messages)
    heard = [one, two] if passes else [two]
    after = "".join(chat.say("And this?", [two]))
    fresh = talker.conversation(decoding=Decoding(8))
    fresh.messages, fresh._waveforms = history, heard[:-1]
    assert after == "".join(fresh.say("And this?", [two]))
    assert chat.num_cached == fresh.num_cached
    assert chat.messages == fresh.messages


def test_template_that_rewrites_earlier_turns(talker):
    """Some templates trim or drop what was said; the dialogue is then read anew, with all its audio."""
    talker.processor.tokenizer.chat_template = (
        "{% for m in messages %}[{{ loop.index if loop.last else 0 }}{{ m['content'] | trim }}]{% endfor %}"
    )
    one, two = waveforms(0.5, 0.7)
    chat = talker.conversation(decoding=Decoding(4))
    first = "".join(chat.say("a", [one]))
    second = "".join(chat.say("b", [two]))
    messages = [user_message("a", 1), {"role": "assistant", "content": first}, user_message("b", 1)]
    again = stream_answer(talker.model, talker.processor, messages, [one, two], Decoding(4))
    assert "".join(again) == second


def test_load_and_ask_in_python(tiny_checkpoint, tmp_path):
    write_waveform(tmp_path / "a.wav", waveforms(0.5)[0])
    loaded = ultravox.load(tiny_checkpoint)
    from_file = loaded.ask(tmp_path / "a.wav", "What is this?", max_new_tokens=5)
    from_bytes = loaded.ask((tmp_path / "a.wav").read_bytes(), "What is this?", max_new_tokens=5)
    assert from_file == from_bytes
    assert isinstance(loaded.ask(None, "Hi", max_new_tokens=5), str)
    assert len(loaded.transcribe([tmp_path / "a.wav", waveforms(0.3)[0]], max_new_tokens=5)) == 2


def test_prompts_supervise_the_answer_and_its_end(tiny_processor):
    tokenizer = tiny_processor.tokenizer
    messages = [
        user_message("Transcribe"), {"role": "assistant", "content": "one"},
        user_message("b"), {"role": "assistant", "content": "two"},
    ]  # fmt: skip
    ids, supervised = render(tokenizer, messages)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False).rstrip()
    said = [token for token, counts in zip(ids, supervised, strict=True) if counts]
    assert tokenizer.decode(said) == "one<|im_end|>two<|im_end|>"
    assert messages[0]["content"] == "<|audio|>Transcribe"
