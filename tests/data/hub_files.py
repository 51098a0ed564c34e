"""Small datasets as Hugging Face ``datasets`` writes them, with real audio in their cells."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile


def wav(seed: int, seconds: float = 0.5) -> bytes:
    """Noise that no other seed has, as a WAV file."""
    buffer = io.BytesIO()
    noise = 0.1 * np.random.default_rng(seed).standard_normal(round(seconds * 16000))
    soundfile.write(buffer, noise.astype(np.float32), 16000, format="WAV")
    return buffer.getvalue()


def rows(count: int, start: int = 0) -> dict[str, list]:
    """Columns of some rows."""
    numbers = range(start, start + count)
    return {
        "id": [f"r{n}" for n in numbers],
        "text": [f"number {n}" for n in numbers],
        "audio": [{"bytes": wav(n), "path": f"r{n}.wav"} for n in numbers],
        "language": ["en" if n % 2 else "de" for n in numbers],
    }


def write_parquet(folder: Path, num_shards: int, rows_each: int, split: str = "train") -> Path:
    """A folder of Parquet files, `{split}-00000-of-0000N.parquet`."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(num_shards):
        table = pa.table(rows(rows_each, shard * rows_each))
        pq.write_table(table, folder / f"{split}-{shard:05d}-of-{num_shards:05d}.parquet", row_group_size=2)
    return folder
