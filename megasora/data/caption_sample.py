"""A sample of the training captions of a run, which its run folder keeps: RUN/captions.json.

    {"clips": 120000, "captions": ["a red circle moves right", ...]}

Prompts are expanded in the style of these captions. Sampling then needs no shards, which may be on another machine or
deleted. The clips are chosen by a hash of their sample ids, the same in every launch and layout.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from zlib_ng.zlib_ng import crc32

from megasora.config import DataConfig
from megasora.data.folder import LocalFolder, open_folder
from megasora.data.shard_damage import DamagedTar
from megasora.data.shard_reader import ShardSplit
from megasora.errors import MegaSoraError
from megasora.files import read_regular_file, write_text_atomic
from megasora.jsonl import parse_json
from megasora.random_numbers import GOLDEN, mix

NAME = "captions.json"
MAX_CAPTIONS = 4096
MAX_REMOTE_CAPTIONS = 512  # of shards behind a url: each is a request
MAX_CAPTION_BYTES = 4096  # longer captions are left out
MAX_FILE_BYTES = 64 << 20
READERS = 16  # threads: most of the time they wait for the disk or the server


def save_caption_sample(run_dir: Path, datasets: Sequence[ShardSplit], weights: Sequence[float]) -> None:
    """Writes captions.json into a run folder, unless it is there. Damaged captions are left out."""
    if not (run_dir / NAME).exists():
        values = {"clips": sum(map(len, datasets)), "captions": sample_captions(datasets, weights)}
        write_text_atomic(run_dir / NAME, json.dumps(values, ensure_ascii=False, indent=0) + "\n")


def load_caption_sample(run_dir: Path, config: DataConfig) -> list[str]:
    """The captions in the run folder; where it has none, of the run's shards. Raises MegaSoraError without any."""
    path = run_dir / NAME
    try:
        captions = parse_json(read_regular_file(path, MAX_FILE_BYTES))["captions"]
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise ValueError("no list of captions")
    except FileNotFoundError:
        captions = read_from_shards(path, config)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise MegaSoraError(f"{path} is damaged ({error}); delete it, and captions are read from the shards") from None
    if not captions:
        raise MegaSoraError(f"{path} has no captions to expand prompts with; set sample.expand=none")
    return captions


def read_from_shards(path: Path, config: DataConfig) -> list[str]:
    """`path`: of the file that is missing, for the message."""
    folders, weights = (config.mixture, config.mixture_weights) if config.mixture else ([config.shards], [1.0])
    try:
        datasets = [ShardSplit.open(open_folder(folder), "train", strict=False) for folder in folders]
    except (MegaSoraError, OSError) as error:
        raise MegaSoraError(
            f"sample.expand needs captions of the training: there is no {path}, and the shards cannot be read "
            f"({error}); set sample.expand=none, or data.shards to their folder"
        ) from None
    return sample_captions(datasets, weights)


def sample_captions(datasets: Sequence[ShardSplit], weights: Sequence[float]) -> list[str]:
    """Captions of at most MAX_CAPTIONS clips, of each dataset in proportion to its weight."""
    is_local = all(isinstance(dataset.folder, LocalFolder) for dataset in datasets)
    count, captions = MAX_CAPTIONS if is_local else MAX_REMOTE_CAPTIONS, []
    with ThreadPoolExecutor(READERS) as pool:
        for dataset, weight in zip(datasets, weights, strict=True):
            clips = choose_clips(dataset.index.sample_ids, round(count * weight / sum(weights)))
            captions += [c for c in pool.map(lambda i, shards=dataset: read_caption(shards, i), clips) if c]
    return captions


def choose_clips(sample_ids: np.ndarray, count: int) -> Iterable[int]:
    """The places of `count` sample ids, int64 [n], in ascending order: those with the smallest hashes (splitmix64)."""
    if len(sample_ids) <= count:
        return range(len(sample_ids))
    hashes = mix(torch.from_numpy(sample_ids.astype(np.int64)) + GOLDEN).numpy().view(np.uint64)
    return np.sort(np.argpartition(hashes, count)[:count]).tolist()


def read_caption(shards: ShardSplit, i: int) -> str | None:
    """The caption of clip `i`, read without its patches; None if it is damaged, empty or very long."""
    offset, size, checksum = shards.index.rows[i]["caption"].item()
    if not 0 < size <= MAX_CAPTION_BYTES or not shards.index.spans_fit(i, shards.tar_bytes(i)):
        return None
    data = bytearray(size)
    try:
        shards.read_range(i, offset, [memoryview(data)])
        return data.decode("utf-8") if crc32(data) == checksum else None
    except (DamagedTar, OSError, UnicodeDecodeError):
        return None
