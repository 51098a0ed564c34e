"""The processor's call, as vLLM makes it, and its files."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, WhisperFeatureExtractor

from ultravox.audio.features import LogMel
from ultravox.errors import AudioError, DataError
from ultravox.model.processing import UltravoxProcessor, add_special_token


def test_audio_token_is_one_id_past_the_table(tiny_processor):
    ids = tiny_processor.tokenizer.encode("a<|audio|>b", add_special_tokens=False)
    assert ids.count(259) == 1
    assert len(ids) == 3
    assert tiny_processor.audio_token_index == 259
    assert tiny_processor.audio_replacement_token_id == 259
    assert add_special_token(tiny_processor.tokenizer) == 259  # and is not added twice
    assert tiny_processor.tokenizer.decode(ids, skip_special_tokens=True) == "ab"


def test_call_in_vllms_form(tiny_processor, make_waveform):
    """31 s make two windows of one clip; a second clip follows in the same message."""
    long, short = make_waveform(31.0), make_waveform(0.25)
    output = tiny_processor(
        text="x<|audio|>y<|audio|>z",
        audios=[long, short],
        sampling_rate=16000,
        include_audio_num_chunks=True,
        return_tensors="pt",
    )
    assert output["audio_num_chunks"].tolist() == [2, 1]
    assert output["audio_lens"].tolist() == [3000, 100, 25]
    assert output["audio_token_len"].tolist() == [300, 10, 3]
    assert output["audio_values"].shape == (3, 80, 3000)
    ids = output["input_ids"][0].tolist()
    assert [index for index, token in enumerate(ids) if token == 259] == [*range(1, 311), *range(312, 315)]
    torch.testing.assert_close(output["audio_values"][1, :, :100], LogMel(80)(long[480_000:]))
    assert (output["audio_values"][1, :, 100:] == 0).all()
    assert "audio_num_chunks" not in tiny_processor(text="<|audio|>", audio=short)


def test_window_tokens_is_what_the_call_gives(tiny_processor, make_waveform):
    for seconds in (0.01, 0.3, 30.0, 30.0001, 61.7):
        waveform = make_waveform(seconds)
        output = tiny_processor(audio=waveform)
        assert output["audio_token_len"].tolist() == tiny_processor.window_tokens(len(waveform))


def test_rows_are_padded_on_the_left(tiny_processor, make_waveform):
    output = tiny_processor(text=["<|audio|>", "abc"], audio=[make_waveform(1.0)])
    assert output["attention_mask"].sum(1).tolist() == [10, 3]
    assert output["attention_mask"][1].tolist() == [0] * 7 + [1] * 3


def test_settable_replacement(tiny_processor, make_waveform):
    tiny_processor.audio_token_replacement = "<|im_end|>"
    ids = tiny_processor(text="<|audio|>", audio=make_waveform(0.5))["input_ids"]
    assert ids.tolist() == [[2] * 5]


@pytest.mark.parametrize(("placeholders", "clips"), [(2, 1), (1, 2), (0, 1), (1, 0)])
def test_more_or_fewer_placeholders_than_clips(tiny_processor, make_waveform, placeholders, clips):
    with pytest.raises(DataError, match=rf"{placeholders} <\|audio\|> placeholders, {clips} audio clips"):
        tiny_processor(text="<|audio|>" * placeholders, audio=[make_waveform(0.2)] * clips)


def test_wrong_audio(tiny_processor):
    with pytest.raises(AudioError, match="8000 samples per second"):
        tiny_processor(text="<|audio|>", audio=np.zeros(100), sampling_rate=8000)
    with pytest.raises(AudioError, match="shape"):
        tiny_processor(text="<|audio|>", audio=[np.zeros((2, 100))])
    with pytest.raises(AudioError, match="at least one"):
        tiny_processor(text="<|audio|>", audio=[np.zeros(0)])
    with pytest.raises(AudioError, match="NaN"):
        tiny_processor(text="<|audio|>", audio=np.array([np.nan] * 100))


def test_round_trip_without_a_network(tiny_processor, tmp_path, make_waveform):
    tiny_processor.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert content["processor_class"] == "UltravoxProcessor"
    assert content["feature_extractor_type"] == "WhisperFeatureExtractor"
    content = json.loads((tmp_path / "processor_config.json").read_text())
    assert content["encoder_ds_factor"] == 320
    assert content["stack_factor"] == 5
    assert content["audio_placeholder"] == "<|audio|>"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "ultravox"}))
    expected = tiny_processor(text="a<|audio|>", audio=make_waveform(0.5))
    for loaded in (UltravoxProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert isinstance(loaded, UltravoxProcessor)
        assert isinstance(loaded.audio_processor, WhisperFeatureExtractor)
        assert loaded.tokenizer.chat_template == tiny_processor.tokenizer.chat_template
        output = loaded(text="a<|audio|>", audio=make_waveform(0.5))
        for name, value in expected.items():
            torch.testing.assert_close(output[name], value)


def test_shipped_template(tiny_processor):
    render = tiny_processor.apply_chat_template
    messages = [{"role": "user", "content": "<|audio|>Hi"}, {"role": "assistant", "content": "Yes"}]
    assert (
        render(messages, tokenize=False)
        == "<|im_start|>user\n<|audio|>Hi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
    )
    parts = [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "Hi"}]}]
    expected = "<|im_start|>user\n<|audio|>Hi<|im_end|>\n<|im_start|>assistant\n"
    assert render(parts, tokenize=False, add_generation_prompt=True) == expected
