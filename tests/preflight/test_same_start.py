"""Processes that start with other settings, code, packages or shards than the first are named with the values."""

from __future__ import annotations

import dataclasses

import pytest

from megasora.config import load
from megasora.preflight.same_start import StartState, find_difference, manifest_hashes, read_start_state
from megasora.run_log import code_version
from megasora.run_log.code_version import code_versions, source_hash

CODE = {"python": "3.12.1", "megasora": "0123456789ab", "torch": "2.13.0"}
SHARDS = {"data/a": "aaaa", "data/b": "bbbb"}


def state(code=CODE, shards=SHARDS, settings=()) -> StartState:
    return StartState(load(None, list(settings)), dict(code), dict(shards))


CASES = {
    "nothing": (state(), None),
    "a setting": (
        state(settings=["run.seed=4", "optim.lr=0.5"]),
        "process 2 was started with another configuration than process 0 (run.seed: 0 -> 4; optim.lr: 0.0001 -> 0.5); "
        "give all processes the same file and the same settings",
    ),
    "the code": (
        state(code=CODE | {"megasora": "ba9876543210"}),
        "process 2 runs other code than process 0 (megasora: 0123456789ab -> ba9876543210); install the same code and "
        "packages on all machines",
    ),
    "packages": (
        state(code=CODE | {"torch": "2.11.0", "python": "3.11.7"}),
        "process 2 runs other code than process 0 (python: 3.12.1 -> 3.11.7; torch: 2.13.0 -> 2.11.0); install the "
        "same code and packages on all machines",
    ),
    "shards under the same path": (
        state(shards=SHARDS | {"data/b": "cccc"}),
        "process 2 reads other shards than process 0 (data/b: bbbb -> cccc); give all machines the same folder",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CASES)
def test_the_first_process_that_differs_is_named_with_the_values_and_a_remedy(what):
    other, message = CASES[what]
    assert find_difference([state(), state(), other, other]) == message


def test_the_state_of_a_process_has_its_sources_packages_and_shards(tmp_path):
    (tmp_path / "dataset.json").write_text("{}")
    config = load(None, [f"data.shards={tmp_path}"])
    read = read_start_state(config)
    assert read.config == config and read.code == code_versions()
    assert read.code["megasora"] == source_hash() and {"python", "torch", "triton", "deepspeed"} < read.code.keys()
    (tmp_path / "dataset.json").write_text("{ }")
    again = read_start_state(config)
    assert again.shards.keys() == read.shards.keys() == {str(tmp_path)} and again.shards != read.shards
    assert dataclasses.replace(again, shards=read.shards) == read
    assert manifest_hashes(load(None, [])) == {}


def test_the_hash_of_the_sources_depends_on_every_byte_and_name(tmp_path, monkeypatch):
    files = {"a.py": "x = 1\n", "folder/b.py": "y = 2\n", "folder/c.txt": "z"}
    monkeypatch.setattr(code_version, "__file__", str(tmp_path / "run_log" / "code_version.py"))

    def hash_of(files: dict[str, str]) -> str:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        result = source_hash.__wrapped__()
        for name in files:
            (tmp_path / name).unlink()
        return result

    first = hash_of(files)
    assert hash_of(files) == hash_of(files | {"folder/c.txt": "other"}) == first
    others = [
        files | {"a.py": "x = 2\n"}, {"a2.py": files["a.py"], "folder/b.py": files["folder/b.py"]},
        files | {"d.py": ""}, {"a.py": "x = 1\ny = 2\n", "folder/b.py": ""},
    ]  # fmt: skip
    assert len({first, *map(hash_of, others)}) == 5
