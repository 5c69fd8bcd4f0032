"""The clips of a run: one dataset, or several with weights, as one list of clips.

A clip is identified in three ways: by its index in this list, which plans use; by its dataset and its index in that
dataset, which reading uses; and by its sample id, (dataset << 40) + its id in the dataset, which keys all randomness.

A clip longer than a pack is an error, or (`data.split_long`) is split in time into parts of whole latent frames, of
nearly equal length. Each part is an entry of the list, with the sample id of the clip and the position of its first
token. Noise and coords of a token follow from its position in the clip, so the parts are noised as one clip would be.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megasora.config import DataConfig
from megasora.data.folder import open_folder
from megasora.data.pack import Record
from megasora.data.reader_lock import ReaderLock
from megasora.data.shard_format import Manifest
from megasora.data.shard_reader import ShardSplit
from megasora.errors import MegaSoraError

DATASET_SHIFT = 40  # bits
# of a manifest: equal in all datasets of a mixture
EQUAL_KEYS = ("codec_fingerprint", "text_fingerprint", "patch", "patch_dim", "text_dim")


def open_mixture(config: DataConfig, split: str) -> Mixture:
    """Opens one split of all datasets of a run. Raises MegaSoraError if a dataset has no clips to train on.

    If damaged clips are tolerated (`data.max_damaged_fraction`), damaged tars of the train split are found only when
    they are read; those of other splits always at once.
    """
    folders, weights = (config.mixture, config.mixture_weights) if config.mixture else ([config.shards], [1.0])
    strict = split != "train" or config.max_damaged_fraction == 0
    reader_lock = ReaderLock()
    datasets = [ShardSplit.open(open_folder(folder, reader_lock), split, strict) for folder in folders]
    for dataset in datasets:
        if split == "train" and not len(dataset):
            raise MegaSoraError(f"{dataset.folder} has no clip in its train split; ingest some, or leave it out")
    return Mixture(datasets, weights, config.tokens_per_pack, config.split_long, reader_lock)


class Mixture:
    """The clips and parts of clips of several datasets, with the relative frequency of each dataset.

    Per entry, [I]: `tokens_I`; `dataset_I`, and `clip_I`, its clip in that dataset; `start_I`, the position of its
    first token in the clip; `is_whole_I`. `token_counts`: `tokens_I` per dataset.
    """

    def __init__(
        self,
        datasets: Sequence[ShardSplit],
        weights: Sequence[float],
        tokens_per_pack: int,
        split_long: bool,
        reader_lock: ReaderLock | None = None,
    ):
        """`reader_lock`: of the folders of all datasets; reader threads must hold it (`ReaderPool`).

        Raises MegaSoraError if the datasets were made with different settings, or a clip has more than
        `tokens_per_pack` tokens and must not or cannot be split.
        """
        self.datasets, self.weights, self.reader_lock = list(datasets), list(weights), reader_lock or ReaderLock()
        check_equal_settings(self.datasets)
        # the dtype of patches in packs: the smallest that holds those of all datasets exactly
        self.dtype = functools.reduce(torch.promote_types, (dataset.dtype for dataset in self.datasets))
        entries = [split_clips(dataset, tokens_per_pack, split_long) for dataset in self.datasets]
        self.token_counts = [tokens_I for _, _, tokens_I, _ in entries]
        self.dataset_I = np.repeat(np.arange(len(entries)), [len(tokens_I) for tokens_I in self.token_counts])
        self.clip_I, self.start_I, self.tokens_I, self.is_whole_I = map(np.concatenate, zip(*entries, strict=True))

    def __len__(self) -> int:
        return len(self.tokens_I)

    @property
    def manifest(self) -> Manifest:
        """The manifest of the first dataset; the values that concern the model are the same in all."""
        return self.datasets[0].manifest

    def read(
        self,
        i: int,
        encode_caption: Callable[[str], Tensor] | None,
        positions: Tensor | None = None,
        out_LP: Tensor | None = None,
    ) -> Record:
        """Reads entry `i`; see ShardSplit.read. Thread-safe.

        `positions`: int64, which tokens of the clip to return; None: all of the entry. `out_LP`: buffer for their
        patches, in the mixture's dtype; None: allocate one.
        """
        dataset = self.dataset_I.item(i)
        shards = self.datasets[dataset]
        if positions is None and not self.is_whole_I.item(i):
            positions = torch.arange(self.tokens_I.item(i)) + self.start_I.item(i)
        direct = positions is None and self.dtype == shards.dtype  # the stored bytes are those of the pack
        record = shards.read(self.clip_I.item(i), encode_caption, out_LP if direct else None)
        patches_LP = record.patches_LP if positions is None else record.patches_LP[positions]
        if out_LP is not None and not direct:
            patches_LP = out_LP.copy_(patches_LP)
        sample_id = (dataset << DATASET_SHIFT) + record.sample_id
        return Record(sample_id, patches_LP, record.grid, record.text_SE, record.native_size, record.caption, positions)

    def largest(self) -> tuple[int, tuple[int, int, int]]:
        """The most frames of a clip, and the most latent frames, rows and columns of tokens, each over all clips."""
        rows = [dataset.index.rows for dataset in self.datasets if len(dataset.index.rows)]
        if not rows:
            return 0, (0, 0, 0)
        frames = max(int(r["native_size"][:, 2].max()) for r in rows)
        return frames, tuple(np.max([r["grid"].max(axis=0) for r in rows], axis=0).tolist())

    def sample_id(self, i: int) -> int:
        """The sample id of an entry, with the number of its dataset above bit 40."""
        dataset, clip = int(self.dataset_I[i]), int(self.clip_I[i])
        return (dataset << DATASET_SHIFT) + int(self.datasets[dataset].index.sample_ids[clip])

    def describe_clip(self, i: int) -> str:
        """The tar and the sample id in its dataset, for messages."""
        shards, clip = self.datasets[self.dataset_I[i]], self.clip_I[i]
        return f"{shards.folder}/{shards.shard_name(clip)}, sample {shards.index.sample_ids[clip]}"

    def identity(self) -> dict[str, Any]:
        """What must be the same when a run resumes: counts, for messages, and hashes.

        `sha256` is over all that plans depend on. Per dataset, `captions` and `patches` are over the checksums of these
        in every clip, so a clip that was captioned or encoded again differs, but not one that is in another tar.
        """
        return dict(self._identity)

    @functools.cached_property
    def _identity(self) -> dict[str, Any]:
        rows = [dataset.index.rows for dataset in self.datasets]
        plan = [
            values
            for dataset, tokens_I in zip(self.datasets, self.token_counts, strict=True)
            for values in (dataset.index.sample_ids, tokens_I)
        ]
        return {
            "clips": [len(tokens_I) for tokens_I in self.token_counts],
            "tokens": [int(tokens_I.sum()) for tokens_I in self.token_counts],
            "weights": self.weights,
            "sha256": hash_columns(plan, "<i8"),
            "captions": [hash_columns([r["caption"]["crc32"], r["text"]["crc32"]], "<u4") for r in rows],
            "patches": [hash_columns([r["patches"]["crc32"]], "<u4") for r in rows],
        }


def hash_columns(columns: Sequence[np.ndarray], dtype: str) -> str:
    """SHA-256 of columns of numbers, as `dtype`."""
    digest = hashlib.sha256()
    for column in columns:
        digest.update(np.ascontiguousarray(column, dtype=dtype).tobytes())
    return digest.hexdigest()


def split_clips(dataset: ShardSplit, tokens_per_pack: int, split_long: bool) -> tuple[np.ndarray, ...]:
    """Per clip or part of a clip: (clip in the dataset, first token, tokens), int64, and whether it is a whole clip.

    Raises MegaSoraError for clips that are longer than a pack.
    """
    tokens = dataset.index.token_counts
    over_pack = np.flatnonzero(tokens > tokens_per_pack)
    if len(over_pack) and not split_long:
        longest = int(over_pack[tokens[over_pack].argmax()])
        raise MegaSoraError(
            f"data.tokens_per_pack={tokens_per_pack} is less than the {tokens[longest]} tokens of "
            f"{describe_source(dataset, longest)}, and of {len(over_pack) - 1} more clips; raise it, set "
            "data.split_long=true, or leave the clips out"
        )
    num_parts = np.ones(len(tokens), dtype=np.int64)
    boundaries: list[list[int]] = []
    for clip in over_pack.tolist():
        frames, rows, columns = dataset.index[clip].grid
        max_frames = tokens_per_pack // (rows * columns)
        if max_frames == 0:
            raise MegaSoraError(
                f"data.tokens_per_pack={tokens_per_pack} is less than the {rows * columns} tokens of one latent frame "
                f"of {describe_source(dataset, clip)}; raise it or leave the clip out"
            )
        parts = -(-frames // max_frames)
        num_parts[clip] = parts
        boundaries.append([frames * part // parts * rows * columns for part in range(parts + 1)])
    clip_I, first_entry = np.repeat(np.arange(len(tokens)), num_parts), np.cumsum(num_parts) - num_parts
    start_I, tokens_I = np.zeros(len(clip_I), dtype=np.int64), tokens[clip_I]
    for clip, starts in zip(over_pack.tolist(), boundaries, strict=True):
        entries = np.s_[first_entry[clip] : first_entry[clip] + num_parts[clip]]
        start_I[entries], tokens_I[entries] = starts[:-1], np.diff(starts)
    return clip_I, start_I, tokens_I, num_parts[clip_I] == 1


def describe_source(dataset: ShardSplit, clip: int) -> str:
    return f"sample {dataset.index.sample_ids[clip]} ({dataset.read_meta(clip).get('source')})"


def check_equal_settings(datasets: list[ShardSplit]) -> None:
    """Raises MegaSoraError if the datasets of a mixture were ingested with different settings."""
    first = datasets[0]
    for other in datasets[1:]:
        for key in EQUAL_KEYS:
            expected, actual = getattr(first.manifest, key), getattr(other.manifest, key)
            if expected != actual:
                raise MegaSoraError(
                    f"data.mixture: {first.folder} was made with {key} {expected}, {other.folder} with {key} {actual}; "
                    "ingest them again with the same settings"
                )
