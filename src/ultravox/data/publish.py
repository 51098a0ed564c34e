"""The last step of preparing a dataset: the index, the lists of rows, ``prepared.json``; then the folder's own name."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ultravox.audio.lengths import SAMPLE_RATE
from ultravox.data.first_seen import FirstSeen
from ultravox.data.prepared import FORMAT_VERSION, PREPARED_FILE, fingerprint_of, hash_id
from ultravox.data.shard import LeftOut, ShardReport
from ultravox.data.sharding import shard_file
from ultravox.files import atomic_write, fsync_file, replace_folder, sha256_file

QUARANTINE_FILE = "quarantine.jsonl"
SAME_AUDIO_FILE = "same_audio.jsonl"
INDEX_SCHEMA = pa.schema(
    [
        ("id_hashes", pa.uint64()),
        ("audio_hashes", pa.uint64()),
        ("num_samples", pa.int32()),
        ("more_num_samples", pa.int64()),
        ("num_tokens", pa.int32()),
        ("shards", pa.int32()),
        ("row_groups", pa.int32()),
        ("rows", pa.int32()),
    ]
)
NEEDED = ["id", "audio_sha256", "num_samples", "more_num_samples", "num_tokens"]


def describe(
    folder: Path,
    splits: Mapping[str, list[ShardReport]],
    left_out: Sequence[LeftOut],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Write the indexes, the two lists and ``prepared.json`` beside the finished shards of a folder.

    Args:
        folder: not yet under its own name.
        splits: reports of the shards of each split, in order.
        left_out: rows that are in no shard.
        about: further keys of ``prepared.json``.

    Returns:
        The content of ``prepared.json``.
    """
    entries: dict[str, Any] = {}
    licences, num_same = Counter[str](), 0
    with closing(FirstSeen()) as seen, open(folder / SAME_AUDIO_FILE, "w", encoding="utf-8") as same_audio:
        for split, reports in splits.items():
            files = [shard_file(split, number, len(reports)) for number in range(len(reports))]
            index = f"index-{split}.parquet"
            num_same += _write_index(folder, index, split, files, seen, same_audio)
            num_samples = sum(report.num_samples for report in reports)
            for report in reports:
                licences.update(report.licences)
            entries[split] = {
                "num_rows": sum(report.num_rows for report in reports),
                "seconds": round(num_samples / SAMPLE_RATE, 3),
                "index": {"file": index, "sha256": sha256_file(folder / index)},
                "shards": [
                    {"file": file, "sha256": report.sha256, "num_bytes": report.num_bytes, "num_rows": report.num_rows}
                    for file, report in zip(files, reports, strict=True)
                ],
            }
    write_quarantine(folder, left_out)
    info = {
        "version": FORMAT_VERSION,
        **about,
        "licences": dict(sorted(licences.items())),
        "splits": entries,
        "quarantine": {
            "file": QUARANTINE_FILE,
            "sha256": sha256_file(folder / QUARANTINE_FILE),
            "counts": dict(sorted(Counter(row.reason for row in left_out).items())),
        },
        "same_audio": {
            "file": SAME_AUDIO_FILE,
            "sha256": sha256_file(folder / SAME_AUDIO_FILE),
            "num_rows": num_same,
        },
    }
    info["fingerprint"] = fingerprint_of(info)
    atomic_write(folder / PREPARED_FILE, json.dumps(info, indent=2, ensure_ascii=False) + "\n")
    return info


def write_quarantine(folder: Path, left_out: Sequence[LeftOut]) -> None:
    """Write down which rows were left out, and why."""
    lines = (json.dumps(asdict(row)) + "\n" for row in left_out)
    atomic_write(folder / QUARANTINE_FILE, "".join(lines))


def _write_index(folder: Path, name: str, split: str, files: list[str], seen: FirstSeen, same_audio: Any) -> int:
    """Write a split's index, shard by shard, and a line for each row whose recording came before; returns how many."""
    num_same = 0
    with pq.ParquetWriter(folder / name, INDEX_SCHEMA, compression="zstd") as writer:
        for number, file in enumerate(files):
            with pq.ParquetFile(folder / file, memory_map=True) as shard:
                groups = [shard.metadata.row_group(group).num_rows for group in range(shard.num_row_groups)]
                table = shard.read(columns=NEEDED, use_threads=False)
            ids, hashes = table.column("id").to_pylist(), table.column("audio_sha256").to_pylist()
            for id, digest in zip(ids, hashes, strict=True):
                before = seen.first(digest, json.dumps({"split": split, "id": id})) if digest else None
                if before is not None:
                    line = {"split": split, "id": id, "same_as": json.loads(before)}
                    same_audio.write(json.dumps(line) + "\n")
                    num_same += 1
            columns = {
                "id_hashes": np.fromiter(map(hash_id, ids), np.uint64, len(ids)),
                "audio_hashes": np.fromiter(map(_hash_audio, hashes), np.uint64, len(ids)),
                "num_samples": table.column("num_samples"),
                "more_num_samples": [sum(more or ()) for more in table.column("more_num_samples").to_pylist()],
                "num_tokens": table.column("num_tokens").fill_null(-1),
                "shards": np.full(len(ids), number),
                "row_groups": np.repeat(np.arange(len(groups)), groups),
                "rows": np.fromiter((row for count in groups for row in range(count)), np.int32, len(ids)),
            }
            writer.write_table(pa.table([columns[field.name] for field in INDEX_SCHEMA], schema=INDEX_SCHEMA))
    return num_same


def _hash_audio(digest: str | None) -> int:
    return int.from_bytes(bytes.fromhex(digest)[:8], "little") if digest else 0


def expected_files(info: Mapping[str, Any]) -> Iterator[str]:
    """Every file of a prepared dataset, relative to its folder."""
    yield from (PREPARED_FILE, info["quarantine"]["file"], info["same_audio"]["file"])
    for split in info["splits"].values():
        yield split["index"]["file"]
        yield from (shard["file"] for shard in split["shards"])


def publish(partial: Path, folder: Path, info: Mapping[str, Any]) -> None:
    """Give the finished folder its own name; an older one of that name goes. What does not belong there goes first."""
    wanted = {partial / file for file in expected_files(info)}
    for path in wanted:
        if path.parent == partial:  # the shards are on the disk already
            fsync_file(path)
    for path in sorted(partial.rglob("*"), reverse=True):
        if path.is_dir():
            with suppress(OSError):  # not empty
                path.rmdir()
        elif path not in wanted:
            path.unlink()
    replace_folder(partial, folder)
