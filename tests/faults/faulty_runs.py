"""What the tests of faults share: recordings with one fault each, runs on manifests and streams, what they say."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from tiny_run import tiny_config

from ultravox.cli.main import main
from ultravox.config.schema import RunConfig

Rows = Sequence[dict[str, Any]]


def rows_of(tones: Path) -> list[dict[str, Any]]:
    """The rows of a dataset, with absolute paths."""
    rows = [json.loads(line) for line in (tones / "train.jsonl").read_text().splitlines()]
    return [{**row, "audio": str(tones / row["audio"])} for row in rows]


def write_rows(path: Path, rows: Rows) -> Path:
    """A manifest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_shards(folder: Path, rows: Rows, count: int = 4) -> Path:
    """The rows as Parquet files with the audio inside, as a stream reads them."""
    folder.mkdir(parents=True)
    inside = [{**row, "audio": {"bytes": Path(row["audio"]).read_bytes(), "path": row["audio"]}} for row in rows]
    table = pa.Table.from_pylist(inside)
    for shard in range(count):
        begin, end = shard * len(rows) // count, (shard + 1) * len(rows) // count
        pq.write_table(table.slice(begin, end - begin), folder / f"train-{shard:05d}-of-{count:05d}.parquet")
    return folder


def config_for(
    parts, source: Path, run_dir: Path, /, *, steps: int = 6, streaming: bool = False, **changes
) -> RunConfig:
    """A stage `tune` on one source; `changes` to the section data, and, with `source`, `stage`, `model`, to those."""
    content = tiny_config(*parts, run_dir).model_dump(mode="json")
    stage = content["stages"][1] | {"max_steps": steps} | changes.pop("stage", {})
    stage["optim"]["warmup_steps"] = 0
    content["stages"] = [stage]
    content["model"] |= changes.pop("model", {})
    entry = {"name": str(source), "streaming": streaming} | changes.pop("source", {})
    content["data"] |= {"sources": [entry], "speeds": [1.0], "stream_window": 10} | changes
    return RunConfig.model_validate(content)


def summary_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "train.json").read_text())


def losses_of(run_dir: Path) -> list[float]:
    found = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in found if "loss" in row]


def set_aside(run_dir: Path) -> dict[str, list[str]]:
    """Reason → the rows' names; of a file its stem, in which the tests put the row's id."""
    named = summary_of(run_dir)["quarantined_files"]
    return {reason: sorted(Path(name).stem for name in names) for reason, names in named.items()}


def written(path: Path, config: RunConfig) -> Path:
    """A configuration as a file."""
    path.write_text(json.dumps(config.model_dump(mode="json")))
    return path


def one_line(words: Sequence[Any], capsys) -> str:
    """A command that must end in code 2 and one line: the line."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("encoding speech")]
    assert line.startswith("ultravox: error: ")
    return line


def run_command(words: Sequence[Any], timeout: float = 120) -> subprocess.CompletedProcess:
    """A command in a process of its own."""
    command = [sys.executable, "-m", "ultravox", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


# Recordings


def tone(seconds: float, rate: int = 16000) -> np.ndarray:
    """Float samples [sample]."""
    return (0.3 * np.sin(np.arange(round(seconds * rate)) * 2 * np.pi * 300 / rate)).astype(np.float32)


def noisy(seconds: float, seed: int = 0) -> np.ndarray:
    """A tone with noise, which FLAC cannot make small: half of the file is half of the clip."""
    noise = np.random.default_rng(seed).standard_normal(round(seconds * 16000))
    return (tone(seconds) + 0.05 * noise).astype(np.float32)


def cut(path: Path) -> Path:
    """A whole file of its suffix, without its last third."""
    soundfile.write(path, noisy(1.0), 16000)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    return path


def with_a_bad_sample(path: Path, value: float) -> Path:
    samples = tone(0.6)
    samples[500] = value
    soundfile.write(path, samples, 16000, subtype="FLOAT")
    return path


def of_samples(path: Path, samples: np.ndarray) -> Path:
    soundfile.write(path, samples, 16000)
    return path


def of_unknown_length(path: Path) -> Path:
    """FLAC as an encoder writes it to a pipe: the header says 0 samples, which stands for "not known"."""
    soundfile.write(path, tone(0.6), 16000, format="FLAC")
    content = bytearray(path.read_bytes())
    numbers = int.from_bytes(content[18:26], "big") >> 36 << 36  # the last 36 bits count the samples
    content[18:26] = numbers.to_bytes(8, "big")
    path.write_bytes(content)
    return path


def of_rate(path: Path, rate: int) -> Path:
    """A wav file whose header claims a sample rate."""
    soundfile.write(path, tone(0.6), 16000)
    content = bytearray(path.read_bytes())
    content[24:28] = rate.to_bytes(4, "little")
    path.write_bytes(content)
    return path


def of_a_three_hour_header(path: Path) -> Path:
    """FLAC of three hours, by its header; the samples end after half a second."""
    soundfile.write(path, tone(0.6), 16000, format="FLAC")
    content = bytearray(path.read_bytes())
    numbers = (int.from_bytes(content[18:26], "big") >> 36 << 36) + 3 * 3600 * 16000
    content[18:26] = numbers.to_bytes(8, "big")
    path.write_bytes(content)
    return path
