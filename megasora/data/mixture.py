"""The clips of a run: one dataset or several with weights in, one numbered list of clips out.

A clip is known in three ways: by its number here, which plans are made of; by its dataset and its place there, where it
is read; and by its sample id, which all that is random is keyed by: (dataset << 40) + its id in the dataset.

A clip longer than a pack is an error, or is split in time into runs of whole latent frames, as equal as can be. Each is
a clip of the list, with the sample id of the whole and the place in it where it begins: what a token is noised with and
where it is follow from its place, so parts differ as parts of one clip do.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megasora.config import DataConfig
from megasora.data.folder import READY
from megasora.data.pack import Record
from megasora.data.shards import Manifest, Shards
from megasora.errors import MegaSoraError

DATASET_SHIFT = 40
ALIKE = ("codec", "text", "patch", "patch_dim", "text_dim")  # of a manifest, in every dataset of a mixture


def open_mixture(config: DataConfig, split: str) -> Mixture:
    """One split of all datasets of a run. Raises MegaSoraError where there is nothing to train on.

    In tolerant mode, tars that are damaged are found when they are read; held-out clips must all be there.
    """
    folders, weights = (config.mixture, config.weights) if config.mixture else ([config.shards], [1.0])
    strict = split != "train" or config.max_bad_fraction == 0
    datasets = [Shards.open(folder, split, strict) for folder in folders]
    for shards in datasets:
        if split == "train" and not len(shards):
            raise MegaSoraError(f"{shards.folder} has no clip in its train split; ingest some, or leave it out")
    return Mixture(datasets, weights, config.tokens_per_pack, config.split_long)


class Mixture:
    """`datasets` and how often clips of each are seen, relative to each other.

    Raises MegaSoraError where datasets were made with different settings, or a clip is longer than `budget` tokens and
    cannot be split or must not be.
    """

    def __init__(self, datasets: Sequence[Shards], weights: Sequence[float], budget: int, split_long: bool):
        self.datasets, self.weights = list(datasets), list(weights)
        check_alike(self.datasets)
        # of patches in packs: what holds those of all datasets exactly
        self.dtype = functools.reduce(torch.promote_types, (shards.dtype for shards in self.datasets))
        pieces = [split_clips(shards, budget, split_long) for shards in self.datasets]
        self.tokens = [tokens for _, _, tokens, _ in pieces]  # of each dataset, int64
        self.dataset_N = np.repeat(np.arange(len(pieces)), [len(tokens) for tokens in self.tokens])
        self.place_N, self.start_N, self.tokens_N, self.whole_N = map(np.concatenate, zip(*pieces, strict=True))

    def __len__(self) -> int:
        return len(self.tokens_N)

    @property
    def manifest(self) -> Manifest:
        """Of the first dataset; what concerns the model is the same in all."""
        return self.datasets[0].manifest

    def read(
        self,
        number: int,
        encode: Callable[[str], Tensor] | None,
        places: Tensor | None = None,
        into_LP: Tensor | None = None,
        waiting: AbstractContextManager = READY,
    ) -> Record:
        """Clip or part of a clip `number`; see Shards.read. May be called by several threads.

        `places`: int64, of the clip's tokens those that are wanted; None: all that `number` stands for. `into_LP`:
        where their patches go, of the mixture's dtype; None: new memory.
        """
        dataset, place = self.dataset_N.item(number), self.place_N.item(number)
        shards = self.datasets[dataset]
        if places is None and not self.whole_N.item(number):
            places = torch.arange(self.tokens_N.item(number)) + self.start_N.item(number)
        straight = places is None and self.dtype == shards.dtype  # as it lies in the tar
        record = shards.read(place, encode, into_LP if straight else None, waiting)
        patches_LP = record.patches_LP if places is None else record.patches_LP[places]
        if into_LP is not None and not straight:
            patches_LP = into_LP.copy_(patches_LP)
        sample_id = (dataset << DATASET_SHIFT) + record.sample_id
        return Record(sample_id, patches_LP, record.grid, record.text_SE, record.native, record.caption, places)

    def sample_id(self, number: int) -> int:
        dataset, place = int(self.dataset_N[number]), int(self.place_N[number])
        return (dataset << DATASET_SHIFT) + int(self.datasets[dataset].entries.sample_ids[place])

    def where(self, number: int) -> str:
        """The tar and the sample, for people."""
        shards, place = self.datasets[self.dataset_N[number]], self.place_N[number]
        name = shards.names[shards.shard_of[place]]
        return f"{shards.folder}/{name}, sample {shards.entries.sample_ids[place]}"

    def identity(self) -> dict[str, Any]:
        """What must not change between two launches of a run: counts for people, and a hash of all that is planned."""
        digest = hashlib.sha256()
        for shards, tokens in zip(self.datasets, self.tokens, strict=True):
            for values in (shards.entries.sample_ids, tokens):
                digest.update(np.ascontiguousarray(values, dtype="<i8").tobytes())
        sizes = [len(tokens) for tokens in self.tokens]
        tokens = [int(tokens.sum()) for tokens in self.tokens]
        return {"clips": sizes, "tokens": tokens, "weights": self.weights, "sha256": digest.hexdigest()}


def split_clips(shards: Shards, budget: int, split_long: bool) -> tuple[np.ndarray, ...]:
    """Of each clip or part of one: (place in the dataset, first token, tokens), int64, and whether it is whole."""
    tokens = shards.tokens()
    long = np.flatnonzero(tokens > budget)
    if len(long) and not split_long:
        worst = int(long[tokens[long].argmax()])
        raise MegaSoraError(
            f"data.tokens_per_pack={budget} is less than the {tokens[worst]} tokens of {name(shards, worst)}, and of "
            f"{len(long) - 1} more clips; raise it, set data.split_long=true, or leave the clips out"
        )
    parts = np.ones(len(tokens), dtype=np.int64)
    cuts: list[list[int]] = []
    for place in long.tolist():
        frames, rows, columns = shards.entries[place].grid
        most = budget // (rows * columns)  # latent frames in a part
        if most == 0:
            raise MegaSoraError(
                f"data.tokens_per_pack={budget} is less than the {rows * columns} tokens of one latent frame of "
                f"{name(shards, place)}; raise it or leave the clip out"
            )
        parts[place] = -(-frames // most)
        cuts.append([frames * i // int(parts[place]) * rows * columns for i in range(int(parts[place]) + 1)])
    place_N, first = np.repeat(np.arange(len(tokens)), parts), np.cumsum(parts) - parts
    start_N, tokens_N = np.zeros(len(place_N), dtype=np.int64), tokens[place_N]
    for place, cut in zip(long.tolist(), cuts, strict=True):
        here = np.s_[first[place] : first[place] + parts[place]]
        start_N[here], tokens_N[here] = cut[:-1], np.diff(cut)
    return place_N, start_N, tokens_N, parts[place_N] == 1


def name(shards: Shards, place: int) -> str:
    return f"sample {shards.entries.sample_ids[place]} ({shards.meta(place)['source']})"


def check_alike(datasets: list[Shards]) -> None:
    """Datasets that were made with different settings cannot be trained on together."""
    first = datasets[0]
    for other in datasets[1:]:
        for key in ALIKE:
            ours, theirs = getattr(first.manifest, key), getattr(other.manifest, key)
            if ours != theirs:
                raise MegaSoraError(
                    f"data.mixture: {first.folder} was made with {key} {ours}, {other.folder} with {key} {theirs}; "
                    "ingest them again with the same settings"
                )
