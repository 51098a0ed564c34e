"""The model as a whole: counts, gradients, logits, generation, caches, saving."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, Gemma2Config, LlamaConfig, WhisperConfig

from ultravox.errors import CheckpointError, ConfigError, DataError, ModelError
from ultravox.model.adapters import add_lora
from ultravox.model.configuration import UltravoxConfig
from ultravox.model.factory import build_model, build_processor, load_language_model, load_model, save_model
from ultravox.model.manifest import MANIFEST_FILE
from ultravox.model.modeling import UltravoxModel
from ultravox.tokens import IGNORE_INDEX

PROMPT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def batch(tiny_processor, make_waveform):
    """Two rows: one clip, and two clips in one message."""
    texts = [PROMPT.format("<|audio|>Transcribe"), PROMPT.format("<|audio|>and<|audio|>?")]
    return tiny_processor(text=texts, audio=[make_waveform(0.5, 1), make_waveform(0.31, 2), make_waveform(0.8, 3)])


def test_built_equals_loaded(tiny_model, tiny_checkpoint, batch):
    """Also finds a language model that lost its causal mask while it was put together."""
    loaded, _ = load_model(tiny_checkpoint)
    torch.testing.assert_close(loaded(**batch).logits, tiny_model(**batch).logits, atol=0, rtol=0)


def test_text_only_is_the_language_model(tiny_model, tiny_models):
    reference = AutoModelForCausalLM.from_pretrained(tiny_models.llama).eval()
    ids = torch.randint(3, 259, (2, 17))
    torch.testing.assert_close(tiny_model(input_ids=ids).logits, reference(ids).logits, atol=1e-5, rtol=0)


def test_padded_rows_equal_single_rows(tiny_model, tiny_processor, make_waveform):
    waveforms = [make_waveform(0.5, 1), make_waveform(1.01, 2)]
    text = PROMPT.format("<|audio|>Transcribe")
    together = tiny_processor(text=[text] * 2, audio=waveforms)
    logits = tiny_model(**together, position_ids=(together["attention_mask"].cumsum(1) - 1).clamp(min=0)).logits
    for row, waveform in enumerate(waveforms):
        alone = tiny_model(**tiny_processor(text=text, audio=waveform)).logits[0]
        torch.testing.assert_close(logits[row, -len(alone) :], alone, atol=1e-4, rtol=1e-4)


def test_audio_is_heard_and_in_its_own_place(tiny_model, tiny_processor, make_waveform):
    text = PROMPT.format("<|audio|>or<|audio|>")
    one, two = make_waveform(0.5, 1), make_waveform(0.5, 2)
    first = tiny_model(**tiny_processor(text=text, audio=[one, two])).logits
    swapped = tiny_model(**tiny_processor(text=text, audio=[two, one])).logits
    assert (first - swapped).abs().max() > 1e-4


def test_counts_are_compared(tiny_model, batch):
    ids = batch["input_ids"].clone()
    ids[1, -1] = tiny_model.config.audio_token_index
    with pytest.raises(DataError, match=r"row 1 has 13 .*fill 12"):
        tiny_model(**{**batch, "input_ids": ids})
    with pytest.raises(DataError, match="row 0"):
        tiny_model(input_ids=batch["input_ids"])
    with pytest.raises(DataError, match="3 audio clips were given"):
        tiny_model(**{**batch, "input_ids": batch["input_ids"][:1], "attention_mask": batch["attention_mask"][:1]})
    with pytest.raises(DataError, match="stack_factor"):
        tiny_model(**{**batch, "audio_token_len": batch["audio_token_len"] + 1})


def test_loss_is_over_supervised_positions_only(tiny_model, batch):
    labels = torch.full_like(batch["input_ids"], IGNORE_INDEX)
    labels[0, -3:] = batch["input_ids"][0, -3:]
    labels[1, -1:] = batch["input_ids"][1, -1:]
    output = tiny_model(**batch, labels=labels)
    assert output.logits.shape == (4, 259)
    full = tiny_model(**batch).logits
    chosen = torch.cat([full[0, -4:-1], full[1, -2:-1]])
    torch.testing.assert_close(output.logits, chosen, atol=1e-5, rtol=1e-5)
    targets = torch.cat([labels[0, -3:], labels[1, -1:]])
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(chosen, targets), atol=1e-5, rtol=1e-5)
    assert tiny_model(**batch, logits_to_keep=1).logits.shape == (2, 1, 259)


def test_supervised_logits_follow_the_language_models_own_head():
    """Gemma caps its logits after the output layer."""
    text = Gemma2Config(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        intermediate_size=32, final_logit_softcapping=0.01,
    )  # fmt: skip
    audio = WhisperConfig(d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16)
    model = UltravoxModel(UltravoxConfig(audio, text, hidden_size=16)).eval()
    ids = torch.randint(3, 50, (1, 6))
    output = model(input_ids=ids, labels=ids)
    torch.testing.assert_close(output.logits, model(input_ids=ids).logits[0, :-1])
    assert output.logits.abs().max() <= 0.01


def gradients(model, batch):
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == model.config.audio_token_index, IGNORE_INDEX)
    model(**batch, labels=labels).loss.backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()}


def test_gradients_stop_at_a_frozen_encoder(tiny_model, batch):
    with_gradient = gradients(tiny_model, batch)
    assert with_gradient == {
        f"multi_modal_projector.{name}.weight" for name in ("ln_pre", "linear_1", "ln_mid", "linear_2")
    }


def test_gradients_reach_the_whole_encoder(tiny_model_config, batch):
    model = build_model(tiny_model_config.model_copy(update={"train_audio_encoder": True}))
    with_gradient = gradients(model, batch)
    wanted = {
        f"audio_tower.{name}"
        for name, _ in model.audio_tower.named_parameters()
        if name != "embed_positions.weight" and not name.endswith("k_proj.bias")
    }
    assert wanted <= with_gradient
    assert not any(name.startswith("language_model") for name in with_gradient)


def test_gradients_reach_encoder_adapters(tiny_model, batch):
    add_lora(tiny_model.audio_tower, 2, 4.0, ["q_proj", "fc1"])
    with_gradient = gradients(tiny_model, batch)
    assert "audio_tower.layers.0.fc1.lora_B" in with_gradient
    assert "audio_tower.layers.0.fc1.weight" not in with_gradient


def greedy_by_hand(model, batch, steps):
    """One row, without any cache."""
    ids = batch["input_ids"]
    for _ in range(steps):
        logits = model(**{**batch, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return ids[:, batch["input_ids"].shape[1] :]


def test_generate_equals_recomputing_everything(tiny_model, tiny_processor, make_waveform):
    batch = tiny_processor(text=PROMPT.format("<|audio|>"), audio=make_waveform(0.6, 1))
    tiny_model.generation_config.eos_token_id = None
    generated = tiny_model.generate(**batch, max_new_tokens=6, do_sample=False)
    assert generated[:, -6:].tolist() == greedy_by_hand(tiny_model, batch, 6).tolist()


def test_generate_with_sampling_and_padding(tiny_model, batch):
    torch.manual_seed(0)
    generated = tiny_model.generate(**batch, max_new_tokens=4, do_sample=True, temperature=1.5, num_return_sequences=1)
    assert generated.shape[0] == 2
    assert int(generated[:, batch["input_ids"].shape[1] :].max()) < 259


@pytest.mark.parametrize("all_audio", [True, False])
def test_second_audio_turn_on_a_kept_cache(tiny_model, tiny_processor, make_waveform, all_audio):
    """The cached turn is not computed again, and the new turn's audio is heard."""
    tiny_model.generation_config.eos_token_id = None
    one, two, other = (make_waveform(0.5, seed) for seed in (1, 2, 3))
    first = tiny_processor(text=PROMPT.format("<|audio|>"), audio=one)
    second = tiny_processor(text="<|im_end|>\n" + PROMPT.format("<|audio|>"), audio=two)
    whole = torch.cat([first["input_ids"], second["input_ids"]], 1)
    everything = {
        "input_ids": whole,
        "attention_mask": torch.ones_like(whole),
        "audio_values": torch.cat([first["audio_values"], second["audio_values"]]),
        "audio_lens": torch.cat([first["audio_lens"], second["audio_lens"]]),
    }

    def second_turn(audio):
        cache = DynamicCache(config=tiny_model.config.text_config)
        tiny_model(**first, past_key_values=cache, use_cache=True)
        lengths = []
        hook = tiny_model.language_model.model.register_forward_pre_hook(
            lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
        )
        generated = tiny_model.generate(**{**everything, **audio}, past_key_values=cache, max_new_tokens=5)
        hook.remove()
        assert lengths == [second["input_ids"].shape[1], 1, 1, 1, 1]
        return generated[0, -5:].tolist()

    given = {} if all_audio else {name: second[name] for name in ("audio_values", "audio_lens")}
    assert second_turn(given) == greedy_by_hand(tiny_model, everything, 5)[0].tolist()
    heard = tiny_processor(audio=other)
    logits = [
        tiny_model(**{**everything, "audio_values": torch.cat([first["audio_values"], audio["audio_values"]])}).logits
        for audio in (second, heard)
    ]
    assert (logits[0][:, -1] - logits[1][:, -1]).abs().max() > 1e-4


def test_public_form(tiny_checkpoint):
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    expected = {
        "architectures": ["UltravoxModel"],
        "model_type": "ultravox",
        "audio_model_id": None,
        "text_model_id": None,
        "audio_token_index": 259,
        "vocab_size": 259,
        "hidden_size": 64,
        "stack_factor": 5,
        "projector_act": "swiglu",
        "projector_ln_mid": True,
        "num_projector_layers": 0,
    }
    assert {key: config[key] for key in expected} == expected
    assert config["audio_config"]["model_type"] == "whisper"
    assert config["text_config"]["model_type"] == "llama"
    assert "ignore_index" not in config
    names = set(load_file(tiny_checkpoint / "model.safetensors"))
    projector = {f"multi_modal_projector.{name}.weight" for name in ("ln_pre", "linear_1", "ln_mid", "linear_2")}
    assert projector <= names
    assert {"audio_tower.conv1.weight", "audio_tower.layers.1.fc2.bias", "audio_tower.layer_norm.weight"} <= names
    assert "language_model.model.embed_tokens.weight" in names
    assert not any("lm_head" in name or "lora" in name for name in names)  # tied, and merged
    assert str(tiny_checkpoint.parent) not in (tiny_checkpoint / "config.json").read_text()


def test_untied_head_is_saved(tiny_models, tmp_path):
    text = LlamaConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        tie_word_embeddings=False,
    )  # fmt: skip
    audio = WhisperConfig(d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16)
    model = UltravoxModel(UltravoxConfig(audio, text, hidden_size=16)).eval()
    model.save_pretrained(tmp_path)
    assert "language_model.lm_head.weight" in load_file(tmp_path / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, UltravoxModel)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), UltravoxConfig)
    ids = torch.arange(3, 9)[None]
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, atol=0, rtol=0)


def test_adapters_are_merged_in_the_file_and_kept_in_the_model(tiny_model, tiny_processor, batch, tmp_path):
    for part, target in ((tiny_model.language_model, "q_proj"), (tiny_model.audio_tower, "fc1")):
        add_lora(part, 2, 4.0, [target])
    with torch.no_grad():
        for name, parameter in tiny_model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_()
    before = tiny_model(**batch).logits
    save_model(tiny_model, tiny_processor, tmp_path / "saved")
    torch.testing.assert_close(tiny_model(**batch).logits, before, atol=0, rtol=0)
    assert any(name.endswith("lora_A") for name, _ in tiny_model.named_parameters())
    loaded, _ = load_model(tmp_path / "saved")
    torch.testing.assert_close(loaded(**batch).logits, before, atol=1e-4, rtol=1e-4)  # W + BA, summed once or twice


def test_an_adapter_on_weights_that_the_embeddings_share_is_refused(tiny_model):
    assert tiny_model.config.text_config.tie_word_embeddings
    with pytest.raises(ConfigError, match="lm_head shares its weights with the embeddings"):
        add_lora(tiny_model.language_model, 2, 4.0, ["q_proj", "lm_head"])
    assert not [name for name, _ in tiny_model.named_parameters() if "lora" in name]


def test_flipped_byte_is_named(tiny_checkpoint):
    path = tiny_checkpoint / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        load_model(tiny_checkpoint)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        UltravoxModel.from_pretrained(tiny_checkpoint)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "processor_config.json", "config.json"])
@pytest.mark.parametrize("with_manifest", [True, False])
def test_damaged_checkpoints(tiny_checkpoint, name, with_manifest):
    if not with_manifest:
        (tiny_checkpoint / MANIFEST_FILE).unlink()
    path = tiny_checkpoint / name
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(CheckpointError, match="damaged"):
        load_model(tiny_checkpoint)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"missing|damaged|holds no saved model"):
        load_model(tiny_checkpoint)


def test_no_checkpoint(tmp_path, tiny_models):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no saved model"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match="'llama' model"):
        load_model(tiny_models.llama)


def test_run_folder_is_a_checkpoint(tiny_checkpoint, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    tiny_checkpoint.rename(run / "model")
    assert load_model(run)[0].config.stack_factor == 5
    assert load_model(run / "model")[0].config.stack_factor == 5


def test_missing_and_named_base_model(tiny_checkpoint, tiny_models, batch):
    """A checkpoint without its language model's weights, as the public ones are."""
    from safetensors.torch import save_file

    expected = load_model(tiny_checkpoint)[0](**batch).logits
    (tiny_checkpoint / MANIFEST_FILE).unlink()
    weights = load_file(tiny_checkpoint / "model.safetensors")
    small = {name: value for name, value in weights.items() if not name.startswith("language_model")}
    save_file(small, tiny_checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks \d+ weights, such as language_model"):
        load_model(tiny_checkpoint)
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    for name, error in ((str(tiny_models.llama), None), (str(tiny_models.root / "gone"), ModelError)):
        (tiny_checkpoint / "config.json").write_text(json.dumps(config | {"text_model_id": name}))
        if error is None:
            torch.testing.assert_close(load_model(tiny_checkpoint)[0](**batch).logits, expected, atol=0, rtol=0)
        else:
            with pytest.raises(error, match=r"builds on .*gone"):
                load_model(tiny_checkpoint)


def test_wrong_parts(tiny_models, tiny_model_config, tmp_path):
    with pytest.raises(ModelError, match="expected a causal language model"):
        load_language_model(str(tiny_models.whisper))
    with pytest.raises(ModelError, match="expected a causal language model"):
        load_language_model(str(tiny_models.hubert))
    with pytest.raises(ModelError, match="nowhere"):
        load_language_model(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="no chat template"):
        build_model(tiny_model_config.model_copy(update={"chat_template": "model"}))
    with pytest.raises(ConfigError, match=r"no file 'typo\.jinja'"):
        build_model(tiny_model_config.model_copy(update={"chat_template": "typo.jinja"}))


def test_hubert_end_to_end(tiny_model_config, tiny_models, make_waveform, tmp_path):
    """Another kind of encoder through the same model: training, saving, loading, generating."""
    config = tiny_model_config.model_copy(
        update={
            "audio_encoder": str(tiny_models.hubert),
            "train_audio_encoder": True,
            "train_feature_encoder": True,
            "stack_factor": 4,
        }
    )
    model, processor = build_model(config), build_processor(config)
    texts = [PROMPT.format("<|audio|>a"), PROMPT.format("<|audio|>b")]
    batch = processor(text=texts, audio=[make_waveform(0.5, 1), make_waveform(0.83, 2)])
    assert batch["audio_values"].shape == (2, 1, round(0.83 * 16000))
    with_gradient = gradients(model, batch)
    assert any(name.startswith("audio_tower.encoder.feature_extractor") for name in with_gradient)
    assert any(name.startswith("audio_tower.encoder.encoder") for name in with_gradient)
    model.eval()
    save_model(model, processor, tmp_path / "saved")
    loaded, loaded_processor = load_model(tmp_path / "saved")
    again = loaded_processor(text=texts, audio=[make_waveform(0.5, 1), make_waveform(0.83, 2)])
    torch.testing.assert_close(loaded(**again).logits, model(**batch).logits, atol=1e-6, rtol=1e-6)
    assert loaded.generate(**again, max_new_tokens=3).shape[0] == 2


def test_bfloat16(tiny_model_config, tiny_processor, make_waveform):
    model = build_model(tiny_model_config.model_copy(update={"dtype": "bfloat16"})).eval()
    output = model(**tiny_processor(text=PROMPT.format("<|audio|>"), audio=make_waveform(0.5)))
    assert output.logits.dtype == torch.bfloat16
    whole = dict(build_model(tiny_model_config).named_buffers())
    rotary = {name: buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    assert rotary
    assert all(torch.equal(buffer, whole[name]) for name, buffer in rotary.items()), "in 16 bits they turn wrongly"
    assert torch.isfinite(output.logits).all()
