"""The files of a shard folder (format 2): names, the index of a tar, the manifest. docs/shards.md describes them.

    dataset.json                  manifest: format, fingerprints of codec and text encoder, patch, counts, all tars
    train-000000-000.tar          WebDataset tar: KEY.caption.txt KEY.meta.json [KEY.text.f16] KEY.patches.f16|.bf16
    train-000000-000.index.npy    one row per clip: sample id, grid, native size, byte ranges in the tar, checksums

Plans are made from the indices alone. They are arrays, so that a million clips are open in a fraction of a second.
There is no pickle anywhere. shard_reader.py reads clips, shard_writer.py writes them, manifest_writer.py
writes dataset.json, verify.py checks every byte.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from zlib_ng.zlib_ng import crc32

from megasora.config import CodecConfig
from megasora.data.folder import Folder, open_folder
from megasora.errors import DataError, MegaSoraError, printable
from megasora.jsonl import parse_json

FORMAT = 2
MANIFEST = "dataset.json"
SPLITS = ("train", "val")
MAX_SHOWN = 60  # characters of a wrong value in a message
CODEC_SPEED_KEYS = ("chunk_frames", "device")  # of [codec], which change no latent
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}

MEMBERS = ("caption", "meta", "text", "patches")  # the files of a record, in the order of the tar
SPAN_DTYPE = [("offset", "<u8"), ("size", "<u8"), ("crc32", "<u4")]  # a byte range of a tar
INDEX_DTYPE = np.dtype(
    [("sample_id", "<i8"), ("grid", "<i4", 3), ("native_size", "<f8", 4), ("record", SPAN_DTYPE)]
    + [(name, SPAN_DTYPE) for name in MEMBERS]  # offset 0: the record has no such file
)


# ---------------------------------------------------------------- the index


@dataclass(frozen=True)
class Entry:
    """A row of an index: one clip, without its patches."""

    sample_id: int
    grid: tuple[int, int, int]  # latent frames, rows, columns of tokens
    native_size: tuple[float, float, float, float]  # height, width (pixels), frames, frames per second
    members: dict[str, tuple[int, int, int]]  # file -> offset, bytes, CRC-32

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


class Index(Sequence):
    """The clips of a split as columns; `index[i]` is an Entry. `rows`: [n] of INDEX_DTYPE."""

    def __init__(self, rows: np.ndarray, dtype: str = "f16"):
        self.rows, self.member_files = rows, member_files(dtype)

    @classmethod
    def from_entries(cls, entries: Sequence[Entry]) -> Index:
        """An index of clips that are in no tar."""
        rows = np.zeros(len(entries), INDEX_DTYPE)
        for row, entry in zip(rows, entries, strict=True):
            row["sample_id"], row["grid"], row["native_size"] = entry.sample_id, entry.grid, entry.native_size
        return cls(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Entry:
        sample_id, grid, native_size, _, *spans = self.rows[i]
        members = {file: span.item() for file, span in zip(self.member_files, spans, strict=True) if span["offset"]}
        return Entry(int(sample_id), tuple(grid.tolist()), tuple(native_size.tolist()), members)

    @property
    def sample_ids(self) -> np.ndarray:
        """int64 [n]"""
        return self.rows["sample_id"]

    def spans_fit(self, i: int, tar_bytes: int) -> bool:
        """Whether the byte ranges of a clip are within a tar of `tar_bytes` bytes."""
        spans = [self.rows[i][name].item() for name in ("record", *MEMBERS)]
        return all(offset + size <= tar_bytes for offset, size, _ in spans)

    @property
    def token_counts(self) -> np.ndarray:
        """int64 [n]: the tokens of each clip."""
        return self.rows["grid"].prod(axis=1, dtype=np.int64)


def member_files(dtype: str) -> tuple[str, ...]:
    """The extensions of a record's files, in the order of MEMBERS. `dtype`: of its patches."""
    return ("caption.txt", "meta.json", "text.f16", f"patches.{dtype}")


def index_name(shard: str) -> str:
    """`train-000000-000.tar` -> `train-000000-000.index.npy`."""
    return shard.removesuffix(".tar") + ".index.npy"


def index_bytes(rows: np.ndarray) -> bytes:
    """`rows`, [n] of INDEX_DTYPE, as a .npy file."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, rows, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


# what numpy writes before the number of rows; bytes 8 and 9 are the length of the header text
NPY_MAGIC, NPY_TEXT = (lambda data: (data[:8], data[10 : data.index(b"'shape'")]))(
    index_bytes(np.zeros(0, INDEX_DTYPE))
)


def read_index(data: bytes, path: str, checksum: int, remedy: str) -> np.ndarray:
    """The rows of an index file, [n] of INDEX_DTYPE. Raises DataError for another CRC-32 or another dtype.

    `path` and `remedy`: for the message.
    """
    actual = crc32(data)
    if actual != checksum:
        raise DataError(f"{path} is damaged: its checksum is {actual:08x}, {MANIFEST} says {checksum:08x}; {remedy}")
    start = 10 + int.from_bytes(data[8:10], "little")
    is_index = data.startswith(NPY_MAGIC) and data[10:].startswith(NPY_TEXT)
    if not is_index or (len(data) - start) % INDEX_DTYPE.itemsize:
        raise DataError(f"{path} is no index of format {FORMAT}; {remedy}")
    return np.frombuffer(data, INDEX_DTYPE, offset=start)


# ---------------------------------------------------------------- the manifest


@dataclass
class Manifest:
    """dataset.json."""

    codec_fingerprint: str
    text_fingerprint: str
    patch: list[int]  # latents per token: frames, rows, columns
    patch_dim: int  # features of a token
    splits: dict[str, dict[str, Any]]  # `count_clips`, and shards: name -> clips, bytes, index_crc32
    rejected: dict[str, int]  # reason -> clips
    text_dim: int = 0  # features of a stored text token; 0: captions are encoded in training
    dtype: str = "f16"  # of the patches: f16 | bf16
    codec_settings: dict[str, Any] = field(default_factory=dict)  # the configuration to build the codec from
    format: int = FORMAT

    def file_names(self) -> list[str]:
        """The names of all tars and indices."""
        tars = [name for counts in self.splits.values() for name in counts["shards"]]
        return tars + [index_name(name) for name in tars]


def read_manifest(folder: str | Path | Folder) -> Manifest:
    """Reads and checks dataset.json.

    Raises MegaSoraError if there is none or another version wrote it, DataError if it is damaged.
    """
    folder = open_folder(folder)
    path = f"{folder}/{MANIFEST}"
    try:
        (data,) = folder.read_whole([MANIFEST])
    except (FileNotFoundError, NotADirectoryError):
        raise MegaSoraError(
            f"no {MANIFEST} in {folder}; make shards with: megasora ingest CLIPS --out {folder}"
        ) from None
    try:
        values = parse_json(data.decode("utf-8"))
        check_version(path, values)
        manifest = Manifest(**values)
        check_manifest(manifest)
        return manifest
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise DataError(f"{path} is damaged: {error}; ingest again") from None


def check_version(path: str, values: dict[str, Any]) -> None:
    """Raises MegaSoraError if the contents `values` of the dataset.json `path` were written by another version."""
    remedy = "ingest again into another --out"
    if values.get("format") != FORMAT:
        found = printable(str(values.get("format", "none")), MAX_SHOWN)
        raise MegaSoraError(f"{path} has format {found}, this version reads {FORMAT}; {remedy}")
    if unknown := sorted(values.keys() - {f.name for f in fields(Manifest)}):
        names = printable(", ".join(unknown), MAX_SHOWN)
        raise MegaSoraError(f"{path} has fields that this version does not know ({names}); {remedy}")


def check_manifest(manifest: Manifest) -> None:
    """Raises ValueError or KeyError for values that no ingest writes; names must be names of files in the folder."""
    if not isinstance(manifest.dtype, str) or manifest.dtype not in DTYPES:
        raise ValueError(f"patches of type {str(manifest.dtype)[:MAX_SHOWN]!r}")
    for key in ("codec_fingerprint", "text_fingerprint"):
        if not isinstance(getattr(manifest, key), str):
            raise ValueError(f"{key} is no text")
    check_integers([*manifest.patch, manifest.patch_dim, manifest.text_dim], "patch, patch_dim or text_dim")
    check_integers(manifest.rejected.values(), "rejected")
    if not isinstance(manifest.codec_settings, dict) or not manifest.splits.keys() <= set(SPLITS):
        raise ValueError(f"codec_settings or splits ({printable(', '.join(manifest.splits), MAX_SHOWN)}) of no ingest")
    for split, counts in manifest.splits.items():
        keys = ("clips", "images", "frames", "tokens", "max_tokens")
        check_integers([*(counts[key] for key in keys), *counts.get("token_histogram", [])], split)
        for name, shard in counts["shards"].items():
            if not re.fullmatch(r"[a-z]+-\d+-\d+\.tar", name, re.ASCII):
                raise ValueError(f"{name[:MAX_SHOWN]!r} is no name of a shard")
            check_integers([shard[key] for key in ("clips", "bytes", "index_crc32")], name)


def check_integers(values: Iterable[object], name: str) -> None:
    """Raises ValueError unless all `values` are integers from 0 on that fit into 64 bits. `name`: for the message."""
    for value in values:
        if type(value) is not int or not 0 <= value < 1 << 63:
            raise ValueError(f"{printable(str(value), MAX_SHOWN)} in {name} is no count")


def check_fingerprints(manifest: Manifest, folder: object, codec: str, text: str, patch: list[int]) -> None:
    """Raises MegaSoraError if the shards were made with another codec, text encoder or patch than this run has.

    Training on such shards would be silently wrong. `codec`, `text`: fingerprints of the run.
    """
    for key, stored, expected in (
        ("codec", manifest.codec_fingerprint, codec),
        ("text", manifest.text_fingerprint, text),
        ("data.patch", manifest.patch, patch),
    ):
        if stored != expected:
            theirs = f": {codec_overrides(manifest)}" if key == "codec" and manifest.codec_settings else ""
            raise MegaSoraError(
                f"{folder} was made with {key} {printable(str(stored), 200)}, this run has {expected}; ingest again "
                f"with the run's settings, or use those of the shards{theirs}"
            )


def codec_overrides(manifest: Manifest) -> str:
    """The settings of the codec that made the shards, as overrides of a command."""
    known, settings = asdict(CodecConfig()), manifest.codec_settings
    own = {key: settings.get(key, default) for key, default in known.items() if key not in CODEC_SPEED_KEYS}
    left_out = ("factors", "channels") if own["path"] else ("path", "tile", "tile_overlap")
    return " ".join(
        f"codec.{key}={printable(str(value).replace(' ', ''), 200)}"
        for key, value in own.items()
        if key not in left_out
    )


def count_clips(rows: np.ndarray) -> dict[str, Any]:
    """Counts over index rows, [n] of INDEX_DTYPE.

    clips, images, frames, tokens, max_tokens (of a clip), token_histogram: clips of 1, 2 to 3, 4 to 7 ... tokens.
    """
    token_counts, frames = Index(rows).token_counts, rows["native_size"][:, 2]
    bins = np.frexp(token_counts.astype(np.float64))[1] - 1 if len(rows) else np.zeros(0, np.int64)
    return {
        "clips": len(rows),
        "images": int((frames == 1).sum()),
        "frames": int(frames.sum()),
        "tokens": int(token_counts.sum()),
        "max_tokens": int(token_counts.max(initial=0)),
        "token_histogram": np.bincount(bins).tolist(),
    }


def add_counts(total: dict[str, Any], counts: dict[str, Any]) -> None:
    """Adds the counts and shards of a split to `total`, in place."""
    for key in ("clips", "images", "frames", "tokens"):
        total[key] += counts[key]
    total["max_tokens"] = max(total["max_tokens"], counts["max_tokens"])
    short, long = sorted((total["token_histogram"], counts["token_histogram"]), key=len)
    short = short + [0] * (len(long) - len(short))
    total["token_histogram"] = [a + b for a, b in zip(short, long, strict=True)]
    total["shards"].update(counts["shards"])
