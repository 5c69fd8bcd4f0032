"""A checkpoint is there whole or not at all, wherever a save is interrupted; damage is found before it is loaded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megasora.checkpoint.store import CheckpointStore, find_checkpoint, remove_incomplete, sha256, verify_checksums
from megasora.errors import MegaSoraError
from megasora.files import write_whole

FILES = {
    "model.safetensors": b"weights of step %d",
    "fragments/rank-00000.safetensors": b"moments of step %d",
    "state.json": b'{"step": %d}',
}


def write_part(store: CheckpointStore, step: int) -> None:
    part = store.begin(step)
    for name, content in FILES.items():
        (part / name).parent.mkdir(exist_ok=True)
        (part / name).write_bytes(content % step)


def save(store: CheckpointStore, *steps: int) -> Path:
    for step in steps:
        write_part(store, step)
        final = store.commit(step)
    return final


def names(store: CheckpointStore) -> list[str]:
    return sorted(p.name for p in store.folder.iterdir())


def test_a_save_holds_what_was_written_and_becomes_the_newest(tmp_path):
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


def test_a_digest_is_that_of_sha256sum(tmp_path):
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
    part = store.begin(10)
    (part / "model.safetensors").write_bytes(b"other weights")
    store.commit(10)
    assert sorted(p.name for p in store.path(10).iterdir()) == ["manifest.json", "model.safetensors"]
    assert verify_checksums(store.newest())["step"] == 10


def test_what_is_left_of_an_earlier_attempt_is_not_part_of_a_save(tmp_path):
    store = CheckpointStore(tmp_path)
    write_part(store, 10)
    (store.staging_dir(10) / "torn.pt").write_bytes(b"half")
    save(store, 10)
    assert not (store.path(10) / "torn.pt").exists()


def test_a_save_after_going_back_is_kept_though_later_ones_are_there(tmp_path):
    """`latest` was set back by hand to go on from step 20: what is saved then must not be swept away as old."""
    store = CheckpointStore(tmp_path, keep=2)
    save(store, 10, 20, 30, 40)
    write_whole(store.folder / "latest", "step-00000030\n")
    save(store, 35)
    assert store.newest() == store.path(35) and verify_checksums(store.path(35))["step"] == 35
    assert [p.name for p in store.complete()] == ["step-00000030", "step-00000035", "step-00000040"]


class Killed(BaseException):
    pass


POINTS = ("replace", "fsync")  # every write to disk that counts passes through one of these


def interrupt_after(monkeypatch, calls: int) -> list[str]:
    """The process dies at call number `calls` of os.replace and os.fsync; returns what was done until then."""
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


def test_a_save_interrupted_anywhere_leaves_a_whole_newest_checkpoint(tmp_path, monkeypatch):
    """Before and after each step of `commit`: the previous save is the newest until `latest` has moved."""
    seen = []
    for calls in range(100):
        store = CheckpointStore(tmp_path / str(calls), keep=1)
        save(store, 10)
        write_part(store, 20)
        with monkeypatch.context() as patch:
            done = interrupt_after(patch, calls)
            try:
                store.commit(20)
                finished = True
            except Killed:
                finished = False
        newest = store.newest()
        assert verify_checksums(newest)["step"] == int(newest.name[5:])
        moved = "replace .latest.part" in done
        assert newest == store.path(20 if moved else 10), done
        seen.append((calls, "replace .step-00000020.part" in done, moved))
        remove_incomplete(store.folder)
        assert not list(store.folder.glob(".*"))
        save(store, 20)  # the resumed run saves again
        assert store.newest() == store.path(20) and verify_checksums(store.path(20))["step"] == 20
        if finished:
            break
    assert {state[1:] for state in seen} == {(False, False), (True, False), (True, True)}  # each point was visited


def test_a_save_that_was_never_committed_is_invisible(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 10)
    write_part(store, 20)
    assert store.newest() == store.path(10) and store.complete() == [store.path(10)]
    remove_incomplete(store.folder)
    assert names(store) == ["latest", "step-00000010"]


def test_parts_of_files_are_removed_too_and_nothing_else(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 10)
    (tmp_path / ".latest.part").write_text("step")
    (tmp_path / ".keep").write_text("mine")
    remove_incomplete(tmp_path)
    assert names(store) == [".keep", "latest", "step-00000010"]


# ---------------------------------------------------------------- refusals


def test_a_missing_latest_is_refused_with_the_remedy_and_not_a_fresh_start(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 10, 20)
    (tmp_path / "latest").unlink()
    with pytest.raises(MegaSoraError) as refusal:
        store.newest()
    for word in ("latest is missing", "step-00000020 is complete", f"echo step-00000020 > {tmp_path / 'latest'}"):
        assert word in str(refusal.value)
    write_whole(tmp_path / "latest", "step-00000020\n")  # the remedy
    assert store.newest() == store.path(20)


@pytest.mark.parametrize("text", ["step-00000030\n", "", "../step-00000020", "\udcff", "step-00000015"])
def test_a_latest_that_names_no_complete_checkpoint_is_refused_with_the_complete_ones(text, tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 10, 20)
    store.path(15).mkdir()  # torn: no manifest
    (tmp_path / "latest").write_text(text, errors="surrogateescape")
    with pytest.raises(MegaSoraError) as refusal:
        store.newest()
    named = text.strip().replace("\udcff", "\ufffd") or "nothing"
    for word in (f"latest names {named}, ", "not complete", "step-00000010, step-00000020"):
        assert word in str(refusal.value)


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_one_flipped_bit_is_found_in_every_file(name, tmp_path):
    store = CheckpointStore(tmp_path)
    final = save(store, 10)
    data = (final / name).read_bytes()
    for place in range(len(data)):
        if chr(data[place]).isspace():
            continue
        for bit in (1, 64):
            (final / name).write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
            with pytest.raises(MegaSoraError, match="use an earlier checkpoint"):
                verify_checksums(final)
    (final / name).write_bytes(data)
    verify_checksums(final)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_and_a_cut_file_are_found_by_name(name, tmp_path):
    final = save(CheckpointStore(tmp_path), 10)
    data = (final / name).read_bytes()
    (final / name).write_bytes(data[:-1])
    with pytest.raises(MegaSoraError, match=f"{name} is damaged: {len(data) - 1} bytes, {len(data)} expected"):
        verify_checksums(final)
    (final / name).unlink()
    with pytest.raises(MegaSoraError, match=f"{name} is missing"):
        verify_checksums(final)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"files": 3}', "{}", '{"files": {"a": 3}, "step": 10}', '{"files": {}, "step": 1}']
)
def test_a_manifest_that_is_none_is_refused(text, tmp_path):
    final = save(CheckpointStore(tmp_path), 10)
    (final / "manifest.json").write_text(text)
    with pytest.raises(MegaSoraError, match="manifest.json cannot be read: .*; use an earlier checkpoint"):
        verify_checksums(final)


def test_a_checkpoint_is_found_by_its_own_name_and_as_the_newest_of_its_run(tmp_path):
    final = save(CheckpointStore(tmp_path / "run" / "checkpoints"), 10, 20)
    assert find_checkpoint(final.with_name("step-00000010")).name == "step-00000010"
    assert find_checkpoint(tmp_path / "run") == final
    for nothing in (tmp_path, tmp_path / "nowhere", final / "fragments"):
        with pytest.raises(MegaSoraError, match=f"{nothing} is no checkpoint"):
            find_checkpoint(nothing)
