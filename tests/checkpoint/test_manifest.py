"""A manifest names the files of a checkpoint; any changed bit, foreign file or hostile name is found unread."""

from __future__ import annotations

import errno
import json
import os
import re

import pytest
from saved_runs import build_saver, flip, save, store_of

from megasora.checkpoint import manifest as manifest_module
from megasora.checkpoint import verify as verify_module
from megasora.checkpoint.block_file import digest_of
from megasora.checkpoint.damage import DamagedCheckpoint
from megasora.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    read_json,
    read_manifest,
    write_manifest,
)
from megasora.checkpoint.sharded import ShardedCheckpoint
from megasora.checkpoint.start import choose_start
from megasora.checkpoint.store import read_state
from megasora.checkpoint.verify import verify_checkpoint
from megasora.errors import MegaSoraError

FRAGMENTS = "fragments/rank-00000.safetensors"


@pytest.fixture
def store(tmp_path):
    store = store_of(tmp_path / "run")
    save(build_saver(store), 10, 20)
    return store


def test_a_digest_equals_that_of_b3sum():
    assert digest_of(b"abc").hex() == "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"


def test_a_manifest_has_the_size_and_digest_of_every_file_and_of_itself(store):
    checkpoint = store.path(20)
    manifest = verify_checkpoint(checkpoint)
    fragments, state = ((checkpoint / name).read_bytes() for name in (FRAGMENTS, "state.json"))
    assert manifest.step == 20
    assert manifest.files == {
        FRAGMENTS: (len(fragments), digest_of(fragments[-64:]).hex()),
        "state.json": (len(state), digest_of(state).hex()),
    }
    first = 8 + int.from_bytes(fragments[:8], "little")
    assert fragments[-64:] == digest_of(fragments[:first]) + digest_of(fragments[first:-64])  # header and one block
    values = json.loads((checkpoint / MANIFEST).read_text())
    own = values.pop("blake3")
    assert own == manifest.digest == digest_of(json.dumps(values, indent=1).encode()).hex()
    assert values["format"] == FORMAT
    assert read_state(checkpoint) == {"step": 20, "task": {"position": 160}}


@pytest.mark.parametrize("name", [MANIFEST, "state.json"])
def test_every_flipped_bit_of_a_small_file_is_found_before_it_is_used(name, store):
    """The checkpoint before it is chosen, at every bit; no flip is another error or changes a value."""
    file = store.path(20) / name
    data = file.read_bytes()
    for offset in range(len(data)):
        for bit in range(8):
            file.write_bytes(data[:offset] + bytes([data[offset] ^ 1 << bit]) + data[offset + 1 :])
            start = choose_start(store, "resume-or-fresh")
            assert start.checkpoint == store.path(10), (offset, bit)
            ((damaged, problem),) = start.damaged
            assert damaged == store.path(20) and problem.startswith(f"{file} ")
    file.write_bytes(data)
    assert choose_start(store, "resume-or-fresh").checkpoint == store.path(20)


def test_a_flipped_bit_at_any_byte_of_the_fragments_is_found(store):
    file = store.path(20) / FRAGMENTS
    data = file.read_bytes()
    for offset in range(len(data)):
        file.write_bytes(data[:offset] + bytes([data[offset] ^ 1 << offset % 8]) + data[offset + 1 :])
        with pytest.raises(DamagedCheckpoint, match=f"{FRAGMENTS} is damaged: (.*differ from|a header of)"):
            verify_checkpoint(store.path(20))


@pytest.mark.parametrize("name", [FRAGMENTS, "state.json"])
def test_missing_and_truncated_files_are_named(name, store):
    file = store.path(20) / name
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(DamagedCheckpoint, match=f"{name} is damaged: {len(data) - 1} bytes, {len(data)} expected; "):
        verify_checkpoint(store.path(20))
    file.unlink()
    with pytest.raises(DamagedCheckpoint, match=f"{name} is missing"):
        verify_checkpoint(store.path(20))


def rewrite(checkpoint, **changes):
    """A manifest with a correct checksum of its own and other values."""
    values = json.loads((checkpoint / MANIFEST).read_text()) | changes
    values.pop("blake3")
    (checkpoint / MANIFEST).write_text(manifest_module.manifest_text(values))


@pytest.mark.parametrize(
    "name",
    [
        "../step-00000010/state.json",
        "/etc/passwd",
        "fragments/../../x",
        "a\\b",
        "a\0b",
        "",
        ".",
        "a//b",
        ".hidden",
        "a/",
    ]
    + ["..", "a/.."],
)
def test_a_hostile_name_is_refused_before_any_file_is_opened(name, store, monkeypatch):
    checkpoint = store.path(20)
    rewrite(checkpoint, files={name: [3, "0" * 64]})
    monkeypatch.setattr(verify_module, "file_actions", lambda *file: pytest.fail(f"{file} was read"))
    with pytest.raises(DamagedCheckpoint, match=r"is no name of a file"):
        verify_checkpoint(checkpoint)


@pytest.mark.parametrize("kind", ["link to a file", "link to a folder", "FIFO", "folder"])
def test_what_is_no_regular_file_is_refused_unread(kind, store, tmp_path):
    checkpoint = store.path(20)
    file = checkpoint / "state.json"
    if kind == "link to a folder":
        (checkpoint / "fragments").rename(tmp_path / "elsewhere")
        (checkpoint / "fragments").symlink_to(tmp_path / "elsewhere")
    else:
        file.rename(tmp_path / "elsewhere")
        make = {"link to a file": lambda f: f.symlink_to(tmp_path / "elsewhere"), "FIFO": os.mkfifo, "folder": os.mkdir}
        make[kind](file)
    with pytest.raises(DamagedCheckpoint, match="is a link|not a regular file|is damaged"):
        verify_checkpoint(checkpoint)


def test_a_file_that_the_manifest_does_not_name_is_not_read(store):
    checkpoint = store.path(20)
    (checkpoint / "fragments" / "rank-00001.safetensors").write_bytes(b"not of this checkpoint")
    (checkpoint / "more.json").write_text("{}")
    assert ShardedCheckpoint(checkpoint).full_tensor("weights", "weight").tolist() == [20, 20, 20]
    with pytest.raises(DamagedCheckpoint, match="more.json is not in manifest.json"):
        read_json(checkpoint, read_manifest(checkpoint), "more.json")


def test_files_of_two_checkpoints_that_were_swapped_are_found(store):
    (store.path(20) / MANIFEST).write_bytes((store.path(10) / MANIFEST).read_bytes())
    with pytest.raises(DamagedCheckpoint, match="it belongs to step 10"):
        read_manifest(store.path(20))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"files": 3}', "[" * 100_000, '{"step": ' + "1" * 10_000 + "}", "\udcff"]
)
def test_an_invalid_manifest_is_damage(text, store):
    (store.path(20) / MANIFEST).write_text(text, errors="surrogateescape")
    with pytest.raises(DamagedCheckpoint, match="manifest.json cannot be read: .*; use an earlier checkpoint"):
        verify_checkpoint(store.path(20))


def test_a_json_file_of_more_than_the_limit_is_not_parsed(store, monkeypatch):
    monkeypatch.setattr(manifest_module, "MAX_JSON_BYTES", 100)
    with pytest.raises(DamagedCheckpoint, match=r"\d+ bytes, at most 100 are expected"):
        read_manifest(store.path(20))


@pytest.mark.parametrize("version", ["before format 1", "format 1", "format 3"])
def test_a_checkpoint_of_another_version_is_one_sentence_and_no_damage(version, store):
    checkpoint = store.path(20)
    if version == "format 3":
        rewrite(checkpoint, format=3)
    elif version == "format 1":
        values = {"format": 1, "step": 20, "files": {"state.json": [3, "0" * 64]}, "sha256": "0" * 64}
        (checkpoint / MANIFEST).write_text(json.dumps(values, indent=1))
    else:
        values = json.loads((checkpoint / MANIFEST).read_text())
        (checkpoint / MANIFEST).write_text(json.dumps({key: values[key] for key in ("step", "files")}, indent=1))
    for read in (verify_checkpoint, lambda _: choose_start(store, "resume-or-fresh")):
        with pytest.raises(MegaSoraError) as error:
            read(checkpoint)
        number = int(version[-1]) if version.startswith("format") else 0
        assert not isinstance(error.value, DamagedCheckpoint)
        assert str(error.value) == (
            f"{checkpoint} was saved by another version of MegaSora (checkpoint format {number}, this version reads "
            "2); continue with that version, or start the run again in another run.dir"
        )


def test_a_disk_error_is_damage(store, monkeypatch):
    def fail(handle, views, start):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(DamagedCheckpoint, match=re.escape(f"{FRAGMENTS} cannot be read: Input/output error")):
        verify_checkpoint(store.path(20))


def test_a_manifest_is_written_as_it_is_read(tmp_path):
    folder = tmp_path / "step-00000007"
    folder.mkdir()
    (folder / "a.b").write_bytes(b"abc")
    write_manifest(folder, 7, {"a.b": (3, digest_of(b"abc").hex())})
    flip(folder / "a.b")
    with pytest.raises(DamagedCheckpoint, match="a.b is damaged: its digest"):
        verify_checkpoint(folder)
