"""What all processes of a launch must have in common before they build a model: settings, code, packages, shards.

Each process describes itself in a small dictionary; the main process compares them all, once they have joined. The
checkpoint that they load is compared when it is chosen (megasora/checkpoint/).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from megasora.config import Config, differences
from megasora.run_log.code_version import code_versions

MAX_SHOWN = 8


@dataclass(frozen=True)
class StartState:
    """What one process starts with."""

    config: Config
    code: dict[str, str]  # version by package
    shards: dict[str, str]  # hash of the manifest by folder


def read_start_state(config: Config) -> StartState:
    """That of this process."""
    return StartState(config, code_versions(), manifest_hashes(config))


def manifest_hashes(config: Config) -> dict[str, str]:
    """Hash of the manifest of each folder of shards, by address; the manifest holds the checksums of what is in it."""
    from megasora.data.folder import open_folder
    from megasora.data.shard_format import MANIFEST

    hashes = {}
    for folder in config.data.mixture or [config.data.shards] * bool(config.data.shards):
        try:
            content = open_folder(folder).read_whole([MANIFEST])[0]
            hashes[folder] = hashlib.sha256(content).hexdigest()[:12]
        except OSError as error:  # of a task that reads other files; opening them says what is wrong
            hashes[folder] = f"not readable, {type(error).__name__}"
    return hashes


def find_difference(states: Sequence[StartState]) -> str | None:
    """How the first process that differs from process 0 does, with the values and the remedy; None if none differs."""
    first = states[0]
    for rank, other in enumerate(states[1:], start=1):
        kinds = (
            ("was started with another configuration than process 0", differences(other.config, first.config),
             "give all processes the same file and the same settings"),
            ("runs other code than process 0", changes(first.code, other.code),
             "install the same code and packages on all machines"),
            ("reads other shards than process 0", changes(first.shards, other.shards),
             "give all machines the same folder"),
        )  # fmt: skip
        for what, changed, remedy in kinds:
            if changed:
                return f"process {rank} {what} ({'; '.join(changed[:MAX_SHOWN])}); {remedy}"
    return None


def changes(first: dict[str, str], other: dict[str, str]) -> list[str]:
    """`key: value of the first -> value of the other` for each key in which two dictionaries differ."""
    keys = {**first, **other}
    return [f"{key}: {first.get(key)} -> {other.get(key)}" for key in keys if first.get(key) != other.get(key)]
