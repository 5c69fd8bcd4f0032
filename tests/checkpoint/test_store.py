"""Checkpoints are saved atomically, wherever a save is interrupted; damage is found before they are loaded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megasora.checkpoint.store import CheckpointStore, find_checkpoint, remove_incomplete, sha256, verify_checksums
from megasora.errors import MegaSoraError
from megasora.files import write_text_atomic

FILES = {
    "model.safetensors": b"weights of step %d",
    "fragments/rank-00000.safetensors": b"moments of step %d",
    "state.json": b'{"step": %d}',
}


def write_staging(store: CheckpointStore, step: int) -> None:
    staging = store.begin(step)
    for name, content in FILES.items():
        (staging / name).parent.mkdir(exist_ok=True)
        (staging / name).write_bytes(content % step)


def save(store: CheckpointStore, *steps: int) -> Path:
    for step in steps:
        write_staging(store, step)
        final = store.commit(step)
    return final


def names(store: CheckpointStore) -> list[str]:
    return sorted(p.name for p in store.folder.iterdir())


def test_a_save_has_the_files_that_were_written_and_becomes_the_newest(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    assert store.newest() is None
    final = save(store, 10)
    assert final == store.path(10) == store.newest() == tmp_path / "checkpoints" / "step-00000010"
    assert {name: (final / name).read_bytes() for name in FILES} == {n: c % 10 for n, c in FILES.items()}
    manifest = verify_checksums(final)
    assert manifest["step"] == 10
    assert manifest["files"] == {n: [len(c % 10), sha256(final / n)] for n, c in FILES.items()}
    assert names(store) == ["latest", "step-00000010"]
    assert (store.folder / "latest").read_text() == "step-00000010\n"


def test_a_digest_equals_that_of_sha256sum(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_newest_are_kept(keep, tmp_path):
    store = CheckpointStore(tmp_path, keep)
    save(store, 10, 20, 100, 1000)
    assert [p.name for p in store.complete()] == ["step-00000010", "step-00000020", "step-00000100", "step-00001000"][
        -keep:
    ]
    assert store.newest() == store.path(1000)


def test_a_step_saved_again_replaces_the_older_save(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 10)
    staging = store.begin(10)
    (staging / "model.safetensors").write_bytes(b"other weights")
    store.commit(10)
    assert sorted(p.name for p in store.path(10).iterdir()) == ["manifest.json", "model.safetensors"]
    assert verify_checksums(store.newest())["step"] == 10


def test_files_of_an_interrupted_save_are_not_in_the_next_one(tmp_path):
    store = CheckpointStore(tmp_path)
    write_staging(store, 10)
    (store.staging_dir(10) / "partial.pt").write_bytes(b"half")
    save(store, 10)
    assert not (store.path(10) / "partial.pt").exists()


def test_a_save_after_latest_was_set_back_is_kept_beside_later_ones(tmp_path):
    """`latest` was set back by hand to resume from step 30: the save of step 35 must not be deleted as an old one."""
    store = CheckpointStore(tmp_path, keep=2)
    save(store, 10, 20, 30, 40)
    write_text_atomic(store.folder / "latest", "step-00000030\n")
    save(store, 35)
    assert store.newest() == store.path(35) and verify_checksums(store.path(35))["step"] == 35
    assert [p.name for p in store.complete()] == ["step-00000030", "step-00000035", "step-00000040"]


class Killed(BaseException):
    pass


POINTS = ("replace", "fsync")  # functions of os that make a write durable


def interrupt_after(monkeypatch, calls: int) -> list[str]:
    """Raises Killed at call number `calls` of os.replace and os.fsync; returns the list of the calls before it."""
    done: list[str] = []

    def wrap(name: str):
        real = getattr(os, name)

        def call(*arguments):
            if len(done) == calls:
                raise Killed
            done.append(f"{name} {Path(arguments[0]).name if name == 'replace' else ''}".strip())
            return real(*arguments)

        monkeypatch.setattr(os, name, call)

    for name in POINTS:
        wrap(name)
    return done


def test_a_save_interrupted_anywhere_leaves_a_complete_newest_checkpoint(tmp_path, monkeypatch):
    """At each step of `commit`: the previous save is the newest until `latest` was replaced."""
    seen = []
    for calls in range(100):
        store = CheckpointStore(tmp_path / str(calls), keep=1)
        save(store, 10)
        write_staging(store, 20)
        with monkeypatch.context() as patch:
            done = interrupt_after(patch, calls)
            try:
                store.commit(20)
                finished = True
            except Killed:
                finished = False
        newest = store.newest()
        assert verify_checksums(newest)["step"] == int(newest.name[5:])
        is_committed = "replace .latest.part" in done
        assert newest == store.path(20 if is_committed else 10), done
        seen.append((calls, "replace .step-00000020.part" in done, is_committed))
        remove_incomplete(store.folder)
        assert not list(store.folder.glob(".*"))
        save(store, 20)  # the resumed run saves again
        assert store.newest() == store.path(20) and verify_checksums(store.path(20))["step"] == 20
        if finished:
            break
    assert {state[1:] for state in seen} == {(False, False), (True, False), (True, True)}  # all states occurred


def test_an_uncommitted_save_is_invisible(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 10)
    write_staging(store, 20)
    assert store.newest() == store.path(10) and store.complete() == [store.path(10)]
    remove_incomplete(store.folder)
    assert names(store) == ["latest", "step-00000010"]


def test_incomplete_files_are_removed_and_nothing_else(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 10)
    (tmp_path / ".latest.part").write_text("step")
    (tmp_path / ".keep").write_text("mine")
    remove_incomplete(tmp_path)
    assert names(store) == [".keep", "latest", "step-00000010"]


# ---------------------------------------------------------------- errors


def test_a_missing_latest_raises_with_the_remedy_instead_of_starting_from_step_0(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 10, 20)
    (tmp_path / "latest").unlink()
    with pytest.raises(MegaSoraError) as error:
        store.newest()
    for word in ("latest is missing", "step-00000020 is complete", f"echo step-00000020 > {tmp_path / 'latest'}"):
        assert word in str(error.value)
    write_text_atomic(tmp_path / "latest", "step-00000020\n")  # the remedy
    assert store.newest() == store.path(20)


@pytest.mark.parametrize("text", ["step-00000030\n", "", "../step-00000020", "\udcff", "step-00000015"])
def test_a_latest_without_a_complete_checkpoint_raises_with_the_complete_ones(text, tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 10, 20)
    store.path(15).mkdir()  # incomplete: no manifest
    (tmp_path / "latest").write_text(text, errors="surrogateescape")
    with pytest.raises(MegaSoraError) as error:
        store.newest()
    name = text.strip().replace("\udcff", "\ufffd") or "nothing"
    for word in (f"latest names {name}, ", "not complete", "step-00000010, step-00000020"):
        assert word in str(error.value)


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_one_flipped_bit_is_found_in_every_file(name, tmp_path):
    store = CheckpointStore(tmp_path)
    final = save(store, 10)
    data = (final / name).read_bytes()
    for offset in range(len(data)):
        if chr(data[offset]).isspace():
            continue
        for bit in (1, 64):
            (final / name).write_bytes(data[:offset] + bytes([data[offset] ^ bit]) + data[offset + 1 :])
            with pytest.raises(MegaSoraError, match="differs from manifest|cannot be read|bytes, |is missing"):
                verify_checksums(final)
    (final / name).write_bytes(data)
    verify_checksums(final)


@pytest.mark.parametrize("name", FILES)
def test_missing_and_truncated_files_raise_with_their_name(name, tmp_path):
    final = save(CheckpointStore(tmp_path), 10)
    data = (final / name).read_bytes()
    (final / name).write_bytes(data[:-1])
    with pytest.raises(MegaSoraError, match=f"{name} is damaged: {len(data) - 1} bytes, {len(data)} expected; "):
        verify_checksums(final)
    (final / name).unlink()
    with pytest.raises(MegaSoraError, match=f"{name} is missing"):
        verify_checksums(final)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"files": 3}', "{}", '{"files": {"a": 3}, "step": 10}', '{"files": {}, "step": 1}']
)
def test_an_invalid_manifest_raises(text, tmp_path):
    final = save(CheckpointStore(tmp_path), 10)
    (final / "manifest.json").write_text(text)
    with pytest.raises(MegaSoraError, match="manifest.json cannot be read: .*; there is no earlier checkpoint; start"):
        verify_checksums(final)


def test_the_error_for_a_damaged_checkpoint_has_the_command_to_resume_from_an_earlier_one(tmp_path):
    store = CheckpointStore(tmp_path, keep=4)
    save(store, 10, 20, 30, 40)
    (store.path(20) / "manifest.json").unlink()  # incomplete
    file = store.path(30) / "state.json"
    file.write_bytes(file.read_bytes().swapcase())
    with pytest.raises(MegaSoraError) as error:
        verify_checksums(store.path(30))
    pointer = tmp_path / "latest"
    assert str(error.value) == (
        f"{file} is damaged: its SHA-256 differs from manifest.json; "
        f"to resume from step-00000010: echo step-00000010 > {pointer}"
    )
    write_text_atomic(pointer, "step-00000010\n")  # the remedy
    assert verify_checksums(store.newest())["step"] == 10


def test_a_checkpoint_is_found_by_its_own_path_and_as_the_newest_of_its_run(tmp_path):
    final = save(CheckpointStore(tmp_path / "run" / "checkpoints"), 10, 20)
    assert find_checkpoint(final.with_name("step-00000010")).name == "step-00000010"
    assert find_checkpoint(tmp_path / "run") == final
    for folder in (tmp_path, tmp_path / "nowhere", final / "fragments"):
        with pytest.raises(MegaSoraError, match=f"{folder} is no checkpoint"):
            find_checkpoint(folder)
