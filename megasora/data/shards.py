"""Shards: clips as the model reads them, in WebDataset tars, with an index beside each tar and one manifest.

    dataset.json               format, fingerprints of codec and text encoder, patch, counts by split
    train-000000.tar           KEY.patches.f16  KEY.caption.txt  KEY.meta.json  [KEY.text.f16]
    train-000000.index.jsonl   a line a clip: sample id, grid, native size, and where each file lies, with its CRC-32

The plan of a run is made from the indices alone; a clip is read by one seek per file and its checksum is verified.
`webdataset.WebDataset("train-000000.tar")` reads the same tars. No pickle anywhere.
"""

from __future__ import annotations

import json
import os
import tarfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megasora.data.pack import Record
from megasora.errors import MegaSoraError

FORMAT = 1
MANIFEST = "dataset.json"
SPLITS = ("train", "val")


@dataclass
class Manifest:
    codec: str  # fingerprint
    text: str
    patch: list[int]
    patch_dim: int  # numbers in a token
    splits: dict[str, dict[str, Any]]  # clips, images, frames, tokens, longest, shards
    rejected: dict[str, int]  # reason -> clips
    text_dim: int = 0  # numbers in a stored text token; 0: captions are read by a trained encoder
    format: int = FORMAT


@dataclass(frozen=True)
class Entry:
    """A line of an index: one clip, without its pixels."""

    sample_id: int
    grid: tuple[int, int, int]
    native: tuple[float, float, float, float]
    members: dict[str, tuple[int, int, int]]  # file -> offset, bytes, CRC-32

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


class ShardWriter:
    """Writes one split into `folder`, closing a tar when it reaches `max_bytes`; call `close` at the end."""

    def __init__(self, folder: Path, split: str, max_bytes: int):
        self.folder, self.split, self.max_bytes = folder, split, max_bytes
        self.shards: list[str] = []
        self.counts = {"clips": 0, "images": 0, "frames": 0, "tokens": 0, "longest": 0}
        self.sink = self.file = None
        self.entries: list[tuple[str, Record]] = []

    def add(self, record: Record, source: str, text_features: Tensor | None) -> None:
        """`source`: the clip's file name, for people. `text_features`: [S, E] where the encoder is run at ingest."""
        import webdataset

        if self.sink is None:
            name = f"{self.split}-{len(self.shards):06d}.tar"
            self.shards.append(name)
            self.file = open(self.folder / name, "wb")  # noqa: SIM115
            self.sink = webdataset.TarWriter(self.file, mtime=0.0)
        key = f"{record.sample_id:09d}"
        height, width, frames, fps = record.native
        meta = {
            "sample_id": record.sample_id, "source": source, "height": height, "width": width, "frames": frames,
            "fps": fps, "grid": record.grid, "shape": list(record.patches_LP.shape),
        }  # fmt: skip
        files = {
            "__key__": key,
            "patches.f16": record.patches_LP.to(torch.float16).numpy().astype("<f2").tobytes(),
            "caption.txt": record.caption.encode("utf-8"),
            "meta.json": json.dumps(meta).encode(),
        }
        if text_features is not None:
            files["text.f16"] = text_features.to(torch.float16).numpy().astype("<f2").tobytes()
        self.sink.write(files)
        self.entries.append((key, record))
        tokens = len(record.patches_LP)
        self.counts["clips"] += 1
        self.counts["images"] += frames == 1
        self.counts["frames"] += int(frames)
        self.counts["tokens"] += tokens
        self.counts["longest"] = max(self.counts["longest"], tokens)
        if self.file.tell() >= self.max_bytes:
            self.close()

    def close(self) -> None:
        if self.sink is None:
            return
        self.sink.close()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.sink = self.file = None
        path = self.folder / self.shards[-1]
        members = index_tar(path)
        lines = []
        for key, record in self.entries:
            entry = Entry(record.sample_id, record.grid, record.native, members[key])
            lines.append(json.dumps(asdict(entry)) + "\n")
        path.with_suffix(".index.jsonl").write_text("".join(lines), encoding="utf-8")
        self.entries = []

    def drop(self) -> None:
        """Closes what an error left open, without finishing it. Nothing to do after `close`."""
        if self.sink is not None:
            with suppress(OSError, ValueError):
                self.sink.close()
            self.file.close()
            self.sink = self.file = None


def index_tar(path: Path) -> dict[str, dict[str, tuple[int, int, int]]]:
    """key -> file -> (offset, bytes, CRC-32) of a tar, read back from disk."""
    found: dict[str, dict[str, tuple[int, int, int]]] = {}
    with open(path, "rb") as raw, tarfile.open(fileobj=raw) as tar:
        for member in tar:
            key, _, name = member.name.partition(".")
            data = os.pread(raw.fileno(), member.size, member.offset_data)
            found.setdefault(key, {})[name] = (member.offset_data, member.size, zlib.crc32(data))
    return found


@dataclass
class Shards:
    """One split, open for reading."""

    folder: Path
    split: str
    manifest: Manifest
    entries: list[Entry]
    shard_of: list[int]  # the tar of each entry
    names: list[str]
    files: dict[int, int] = field(default_factory=dict)  # open file descriptors

    @classmethod
    def open(cls, folder: Path, split: str) -> Shards:
        manifest = read_manifest(folder)
        entries, shard_of = [], []
        names = manifest.splits.get(split, {}).get("shards", [])
        for number, name in enumerate(names):
            index = (folder / name).with_suffix(".index.jsonl")
            for path in (folder / name, index):
                if not path.is_file():
                    raise MegaSoraError(f"{path} is missing, {folder / MANIFEST} names it; ingest again or restore it")
            entries += read_index(index)
            shard_of += [number] * (len(entries) - len(shard_of))
        found = {"clips": len(entries), "tokens": sum(entry.tokens for entry in entries)}
        for what, count in found.items():
            declared = manifest.splits.get(split, {}).get(what, 0)
            if count != declared:
                raise MegaSoraError(
                    f"the indices of {folder / split}-*.tar hold {count} {what}, {folder / MANIFEST} says {declared}: "
                    "one of them was cut or changed; ingest again or restore it"
                )
        return cls(folder, split, manifest, entries, shard_of, names)

    def __len__(self) -> int:
        return len(self.entries)

    def tokens(self) -> np.ndarray:
        return np.array([entry.tokens for entry in self.entries], dtype=np.int64)

    def read(self, number: int, encode: Callable[[str], Tensor] | None) -> Record:
        """Clip `number`. `encode` reads the caption now; None takes the features that ingest stored."""
        entry = self.entries[number]
        caption = self.member(number, "caption.txt").decode("utf-8")
        patches = np.frombuffer(self.member(number, "patches.f16"), dtype="<f2").reshape(entry.tokens, -1)
        if encode is None:
            features = np.frombuffer(self.member(number, "text.f16"), dtype="<f2")
            text = torch.from_numpy(features.astype(np.float32)).view(-1, self.manifest.text_dim)
        else:
            text = encode(caption)
        return Record(entry.sample_id, torch.from_numpy(patches.copy()), entry.grid, text, entry.native, caption)

    def meta(self, number: int) -> dict[str, Any]:
        return json.loads(self.member(number, "meta.json"))

    def member(self, number: int, name: str) -> bytes:
        shard = self.shard_of[number]
        path = self.folder / self.names[shard]
        if shard not in self.files:
            self.files[shard] = os.open(path, os.O_RDONLY)
        offset, size, checksum = self.entries[number].members[name]
        data = os.pread(self.files[shard], size, offset)
        if len(data) != size or zlib.crc32(data) != checksum:
            raise MegaSoraError(
                f"{path}: {name} of sample {self.entries[number].sample_id} at byte {offset} is damaged "
                f"({len(data)} of {size} bytes, checksum {zlib.crc32(data):08x}, expected {checksum:08x}); ingest again"
            )
        return data


def read_index(path: Path) -> list[Entry]:
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            values = json.loads(line)
            members = {k: tuple(v) for k, v in values["members"].items()}
            t, h, w = values["grid"]
            entries.append(Entry(values["sample_id"], (t, h, w), tuple(values["native"]), members))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MegaSoraError(f"{path}:{number} is damaged: {error}; ingest again or restore it") from None
    return entries


def read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not path.is_file():
        raise MegaSoraError(f"no {MANIFEST} in {folder or '.'}; make shards with: megasora ingest CLIPS --out {folder}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.get("format") != FORMAT:
            raise MegaSoraError(f"{path} has format {values.get('format')}, this version reads {FORMAT}; ingest again")
        return Manifest(**values)
    except (ValueError, TypeError, AttributeError) as error:
        raise MegaSoraError(f"{path} is damaged: {error}; ingest again") from None


def check_fingerprints(manifest: Manifest, folder: Path, codec: str, text: str, patch: list[int]) -> None:
    """Shards of another codec, text encoder or patch would train silently wrong."""
    for key, theirs, ours in (
        ("codec", manifest.codec, codec), ("text", manifest.text, text), ("data.patch", manifest.patch, patch)
    ):  # fmt: skip
        if theirs != ours:
            raise MegaSoraError(
                f"{folder} was made with {key} {theirs}, this run has {ours}; ingest again with the run's settings, "
                "or give the run those of the shards"
            )
