"""Language models of four families, tiny and random, through the same training, saving, loading and asking."""

import json

import pytest
import torch
from tiny_run import tiny_config
from transformers import (
    AutoConfig,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import ultravox
from ultravox.audio.waveform import load_waveform
from ultravox.config.schema import RunConfig
from ultravox.model.adapters import lora_layers
from ultravox.model.factory import build_model, build_processor, load_model, save_model
from ultravox.training.run import run_training

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 24}),
}
OBJECTIVES = {
    "distillation": {"distillation": {"weight": 0.5}, "label_smoothing": 0.05, "z_loss_weight": 1e-4},
    "end of audio, early; next frame": {
        "end_of_audio": {"variant": "early", "weight": 0.3, "end_text": "!", "middle_text": "."},
        "next_frame": {"weight": 0.1, "mask_share": 0.2},
    },
    "end of audio, late": {"end_of_audio": {"variant": "late"}},
    "end of audio, head": {"end_of_audio": {"variant": "head", "weight": 0.3}},
}


@pytest.fixture(scope="module")
def language_models(parts, tmp_path_factory):
    """A folder of each family, with the tiny tokenizer."""
    (llama, _), _ = parts
    tokenizer = AutoTokenizer.from_pretrained(llama)
    root = tmp_path_factory.mktemp("families")
    for name, (kind, config, more) in FAMILIES.items():
        torch.manual_seed(3)
        kind(config(vocab_size=len(tokenizer), **SIZES, **more)).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def family_config(family, language_models, parts, run_dir, **model) -> RunConfig:
    (_, whisper), tones = parts
    content = tiny_config((language_models / family, whisper), tones, run_dir).model_dump(mode="json")
    content["model"] |= model
    for stage, steps in zip(content["stages"], (40, 8), strict=True):
        stage |= {"max_steps": steps, "accumulation_steps": 1}
    return RunConfig.model_validate(content)


def rms(values):
    return float(values.detach().float().square().mean().sqrt())


@pytest.mark.parametrize("family", FAMILIES)
def test_from_training_to_an_answer(family, language_models, parts, tmp_path):
    """Aligned, tuned, saved, loaded, asked; tokens around the audio keep what they have learnt."""
    config = family_config(family, language_models, parts, tmp_path / "run", audio_boundaries=True)
    run = run_training(config)
    stages = json.loads((run / "train.json").read_text())["stages"]
    assert [stage["skipped_steps"] for stage in stages] == [0, 0]
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["stage"] == "align" and "loss" in row]
    assert losses[-1] < 0.8 * losses[0]

    model, processor = load_model(run)
    clip = next(iter((parts[1] / "audio").glob("*.wav")))
    waveform = load_waveform(clip)
    inputs = processor(text="Transcribe<|audio|>", audios=[waveform])
    with torch.no_grad():
        embeddings = model.hear_prompt(**inputs)[0][0]
        is_audio = inputs["input_ids"][0] == processor.audio_token_index
        bounds = torch.isin(inputs["input_ids"][0], torch.tensor(model.config.audio_boundary_ids))
        assert int(bounds.sum()) == 2
        text = rms(embeddings[~is_audio & ~bounds])
        # as loud as words are, also where the language model multiplies its rows by √hidden = 8
        assert 0.4 < rms(embeddings[is_audio]) / text < 2.5
        assert 0.2 < rms(embeddings[bounds]) / text < 2.5
        whole = model(**inputs).logits[0, -1]
        cached = model.generate(
            **inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    allowed = torch.ones(len(whole), dtype=torch.bool)
    allowed[model.config.audio_boundary_ids] = False
    torch.testing.assert_close(cached.logits[0][0][allowed], whole[allowed], atol=1e-5, rtol=1e-4)
    assert isinstance(ultravox.load(run).transcribe([clip], max_new_tokens=4)[0], str)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_logits_are_the_same_before_saving_and_after_loading(family, tied, language_models, parts, tmp_path):
    """Adapters, and rows of the tokens around the audio, that are far from where they began; those tokens' own too."""
    folder = language_models / family
    if not tied:
        kind, config, more = FAMILIES[family]
        vocabulary = AutoConfig.from_pretrained(folder).vocab_size
        folder = tmp_path / "untied"
        kind(config(vocab_size=vocabulary, **SIZES | {"tie_word_embeddings": False}, **more)).save_pretrained(folder)
        AutoTokenizer.from_pretrained(language_models / family).save_pretrained(folder)
    config = family_config(family, language_models, parts, tmp_path, audio_boundaries=True).model
    config = config.model_copy(update={"language_model": str(folder)})
    model, processor = build_model(config).eval(), build_processor(config)
    torch.manual_seed(1)
    with torch.no_grad():
        model.audio_boundaries.weight.normal_(std=0.5)
        for layer in lora_layers(model).values():
            layer.lora_B.normal_(std=0.1)
    clip = load_waveform(next(iter((parts[1] / "audio").glob("*.wav"))))
    inputs = processor(text="Say<|audio|>now", audios=[clip])
    bounds = torch.isin(inputs["input_ids"], torch.tensor(model.config.audio_boundary_ids))
    assert int(bounds.sum()) == 2
    with torch.no_grad():
        before = model(**inputs).logits
        save_model(model, processor, tmp_path / "model")
        again, processor_again = load_model(tmp_path / "model")
        after = again(**processor_again(text="Say<|audio|>now", audios=[clip])).logits
    assert after.shape == before.shape
    torch.testing.assert_close(after[bounds], before[bounds], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_projector_is_as_loud_as_words(family, language_models, parts, tmp_path):
    config = family_config(family, language_models, parts, tmp_path).model
    model, processor = build_model(config), build_processor(config)
    ids = torch.arange(3, len(processor.tokenizer) - 1)[None]
    words = rms(model.get_input_embeddings()(ids))
    assert model.embedding_rms() == pytest.approx(words, rel=0.05)
    assert model.embedding_scale() == (8.0 if family == "gemma3" else 1.0)
    embeddings, _ = model.project(torch.randn(1, 30, 32), torch.tensor([30]))
    assert 0.4 < rms(embeddings) / words < 2.5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_each_objective_trains(objective, family, language_models, parts, tmp_path, monkeypatch):
    content = family_config(family, language_models, parts, tmp_path / "run").model_dump(mode="json")
    monkeypatch.chdir(parts[1].parent)
    for source in content["data"]["sources"]:  # sources are shuffled by their names: the same in every run of this test
        source["name"] = f"./{parts[1].name}"
    content["stages"] = content["stages"][1:]
    content["stages"][0] |= {"max_steps": 16, "evaluate_every": 4, "tune": OBJECTIVES[objective]}
    content["stages"][0]["optim"] |= {"warmup_steps": 0, "lr": {"projector": 1e-2, "language_model": 1e-2}}
    if "next frame" in objective:
        content["data"]["speeds"] = [1.0]
    run = run_training(RunConfig.model_validate(content))
    (stage,) = json.loads((run / "train.json").read_text())["stages"]
    assert (stage["steps"], stage["skipped_steps"]) == (16, 0)
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = [row["kept_out_loss"] for row in rows if "kept_out_loss" in row]  # batches of cut clips differ too much
    assert losses[-1] < losses[0]
    assert all(0 < row["loss"] < 20 for row in rows if "loss" in row)
