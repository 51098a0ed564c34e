"""A saved model as something to evaluate: tiny random weights, the real way through model and processor."""

import numpy as np
import pytest
import torch
import yaml

from ultravox.evaluation.bounds import TextReader, WhisperRecogniser, find_recogniser, splice_text
from ultravox.evaluation.checkpoint import Checkpoint, find_checkpoint
from ultravox.evaluation.loading import load_system
from ultravox.evaluation.runner import Settings, evaluate
from ultravox.evaluation.token_view import token_view
from ultravox.inference.generate import transcript_token_limit


@pytest.fixture
def tiny_run(tmp_path, tiny_model, tiny_processor, tiny_models, dataset):
    from ultravox.model.factory import save_model

    run = tmp_path / "run"
    save_model(tiny_model, tiny_processor, run / "model")
    config = {"model": {"audio_encoder": str(tiny_models.whisper)}, "data": {"transcript_style": "spoken"}}
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"evaluation": {"source": str(dataset)}}))
    return run


def test_evaluation_of_a_saved_model(tiny_run, dataset, questions):
    settings = Settings(batch_size=3, max_new_tokens=6, limit=4, questions=str(questions), num_bootstrap=50)
    results, folder = evaluate(tiny_run, str(dataset), settings=settings)
    assert folder == tiny_run / "evaluations" / "tones-heldout-partial"
    assert results["generation"]["transcript_limit"] == {
        "extra_tokens": 4,
        "tokens_per_second": 6.0,
        "min_repeated_tokens": 12,
        "min_times": 2,
    }
    assert transcript_token_limit(round(2.5 * 16000)) == 4 + 15
    assert results["wer"]["n"] == results["answers"]["n"] == 4
    assert results["wer"]["value"] > 0.5  # random weights
    assert results["audio_use"]["verdict"] in ("FAIL", "PASS")
    assert results["bounds"]["text"]["wer"] is not None
    assert "lower case" in results["bounds"]["text"]["method"]
    assert results["batch_invariance"]["equal"] == results["batch_invariance"]["n"] == 4
    assert "<|audio|>" in results["generation"]["prompt"]
    # the tiny Whisper has no tokenizer: absent, with the reason, and no zero
    assert results["bounds"]["cascade"]["wer"] is None
    assert "no tokenizer" in results["bounds"]["cascade"]["absent"]
    assert "model.safetensors" in results["checkpoint"]["files"]


def test_a_model_on_its_own_has_no_recogniser(tiny_checkpoint):
    system = load_system(find_checkpoint(tiny_checkpoint), batch_size=2, max_new_tokens=4)
    assert system.recognise is None
    assert "no run config" in system.reason("recognise")


def test_an_encoder_that_is_no_whisper_has_no_recogniser(tiny_models, tmp_path):
    recogniser, reason = find_recogniser(
        Checkpoint(tmp_path, None, {"model": {"audio_encoder": str(tiny_models.hubert)}})
    )
    assert recogniser is None
    assert "no Whisper" in reason


def test_text_goes_where_the_audio_was():
    assert splice_text([1, 9, 2], [5, 6, 7], 9) == [1, 5, 6, 7, 2]
    with pytest.raises(ValueError, match="got 2"):
        splice_text([9, 1, 9], [5], 9)


def test_reading_text_is_hearing_perfect_embeddings(tiny_model, tiny_processor, make_waveform, monkeypatch):
    # If the projector gave exactly the transcript's embeddings, the model would answer as it does to text.
    from ultravox.data.prompts import render_prompt, user_message
    from ultravox.inference.generate import transcribe

    text, waveform = "hello you", make_waveform(0.85)  # 9 tokens and 9 audio positions of 100 ms
    rows = tiny_model.get_input_embeddings()(torch.tensor(tiny_processor.tokenizer(text).input_ids))
    assert tiny_processor.window_tokens(len(waveform)) == [len(rows)]
    monkeypatch.setattr(tiny_model, "project", lambda *_: (rows[None], torch.tensor([len(rows)])))
    heard = transcribe(tiny_model, tiny_processor, [waveform], batch_size=1, max_new_tokens=8)
    prompt = render_prompt(tiny_processor.tokenizer, [user_message("Transcribe")])
    read = TextReader(tiny_model, tiny_processor, prompt, max_new_tokens=8)
    assert read([text]) == heard
    assert read([text, "a much longer text than that"])[:1] == heard  # padding changes nothing


def test_token_view_names_the_embedding_rows(tiny_model, tiny_processor, make_waveform, monkeypatch):
    text = "hello you"
    rows = tiny_model.get_input_embeddings()(torch.tensor(tiny_processor.tokenizer(text).input_ids))
    monkeypatch.setattr(tiny_model, "project", lambda *_: (2 * rows[None], torch.tensor([len(rows)])))
    view = token_view(tiny_model, tiny_processor, make_waveform(0.85))
    assert "".join(view.tokens) == text
    assert view.cosines == pytest.approx([1.0] * len(rows), abs=1e-4)
    assert view.seconds == pytest.approx(0.1)
    monkeypatch.setattr(tiny_model.audio_tower, "frames_per_second", 25)  # another encoder
    assert token_view(tiny_model, tiny_processor, make_waveform(0.85)).seconds == pytest.approx(0.2)


def test_long_clips_are_recognised_in_windows():
    class Counting(WhisperRecogniser):
        def __init__(self):
            self.seen = []

        def _window_texts(self, windows):
            self.seen += [len(window) for window in windows]
            return [f"{len(window) // 16000}s" for window in windows]

    recogniser = Counting()
    seconds = [1, 65, 30]
    assert recogniser.transcribe([np.zeros(16000 * s, np.float32) for s in seconds]) == ["1s", "30s 30s 5s", "30s"]
    assert max(recogniser.seen) == 16000 * 30
