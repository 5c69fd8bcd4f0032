"""Weights to start from (run.start=init:PATH): a rank reads its part; a hostile file is an error of one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from megasora.checkpoint import foreign_file
from megasora.checkpoint.stored_weights import FileWeights, open_weights
from megasora.checks import check_initial_weights
from megasora.config import load
from megasora.errors import MegaSoraError
from megasora.formats.safetensors_folder import write_parts
from megasora.model.init import DrawnWeights
from megasora.parallel.shared_reads import SharedReads, open_on_node, shared_reads
from megasora.parallel.world import World
from megasora.parallelize import WeightsToLoad, initial_weights
from megasora.placement import Placement
from megasora.testing.spawn import run_ranks

SHAPE = torch.Size([2, 2])


def config_of(path: Path):
    return load(None, [f"run.dir={path.parent}/run", f"run.start=init:{path}"])


def read(path: Path, name: str = "a") -> torch.Tensor:
    out = torch.full(SHAPE, torch.nan)
    initial_weights(config_of(path)).fill(out, name)
    return out


def header_file(header: object, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(64)


F32 = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
HEADERS = {
    "empty": b"",
    "huge header": header_file({}, 1 << 62),
    "no JSON": header_file(b"<html>"),
    "deep": header_file(b"[" * 100_000),
    "overlapping": header_file({"a": F32, "b": {**F32, "data_offsets": [8, 24]}}),
    "beyond the file": header_file({"a": {**F32, "data_offsets": [0, 1 << 40], "shape": [1 << 38]}}),
    "unknown dtype": header_file({"a": {**F32, "dtype": "Q7"}}),
    "a shape that does not fit": header_file({"a": {**F32, "shape": [5]}}),
    "a product that overflows": header_file({"a": {**F32, "shape": [1 << 62, 1 << 62]}}),
    "a pickle": b"\x80\x04\x95" + b"a" * 200,
}


def check_error(path: Path, words: str) -> None:
    with pytest.raises(MegaSoraError) as caught:
        read(path)
    text = str(caught.value)
    assert text.startswith(f"run.start=init:{path}") and words in text and text.isprintable() and len(text) < 500


@pytest.mark.parametrize("name", HEADERS)
def test_a_hostile_file_cannot_be_read(name, tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(HEADERS[name])
    check_error(path, "cannot be read")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(value, tmp_path):
    weight = torch.zeros(SHAPE)
    weight[1, 1] = value
    save_file({"a": weight}, tmp_path / "weights.safetensors")
    check_error(tmp_path / "weights.safetensors", ": a is float32, or some of its weights are NaN or infinite")


def test_weights_are_floating_point_numbers(tmp_path):
    path = tmp_path / "weights.safetensors"
    for dtype, name in ((torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")):
        save_file({"a": torch.zeros(SHAPE).to(dtype)}, path)
        check_error(path, f"a is {name}")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        weight = torch.arange(4.0).reshape(SHAPE).to(dtype)
        save_file({"a": weight}, path)
        assert torch.equal(read(path), weight)


def test_a_missing_weight_and_another_shape_are_named(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"b": torch.zeros(SHAPE)}, path)
    check_error(path, "a is [2, 2], the file has none")
    save_file({"a": torch.zeros(3)}, path)
    check_error(path, "a is [2, 2], the file has [3]")


def test_a_float64_that_fp32_cannot_hold_is_no_weight(tmp_path):
    save_file({"a": torch.full(SHAPE, 1e300, dtype=torch.float64)}, tmp_path / "weights.safetensors")
    check_error(tmp_path / "weights.safetensors", "a is float32, or some of its weights are NaN or infinite")


# ---------------------------------------------------------------------- parts


@pytest.fixture
def bytes_read(monkeypatch):
    """The bytes of each read of a weight file."""
    sizes, read_into = [], foreign_file.read_into

    def counted(handle, offset, out, path):
        sizes.append(out.nbytes)
        read_into(handle, offset, out, path)

    monkeypatch.setattr(foreign_file, "read_into", counted)
    return sizes


@pytest.mark.parametrize("buffer_bytes", [64, 200, 8 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_rank_reads_its_part_of_the_full_tensor_and_not_a_byte_more(
    dtype, buffer_bytes, tmp_path, bytes_read, monkeypatch
):
    monkeypatch.setattr(foreign_file, "BUFFER_BYTES", buffer_bytes)
    full = torch.randn(24, 18).to(dtype)
    save_file({"b": torch.ones(3), "a": full}, tmp_path / "w.safetensors")
    weights = open_weights(tmp_path / "w.safetensors", "PATH")
    parts = ((Placement(), 3), (Placement(0), 1), (Placement(0), 4), (Placement(1), 3))
    for placement, size in (*parts, (Placement(0, 3), 2), (Placement(1, 2), 3)):
        for rank in range(size):
            bytes_read.clear()
            out = torch.full(placement.local_shape(full.shape, size), torch.nan)
            weights.fill(out, "a", placement, rank, size)
            assert torch.equal(out, placement.local(full, rank, size).float())
            assert sum(bytes_read) == out.numel() * dtype.itemsize and max(bytes_read) <= buffer_bytes


def test_a_weight_that_is_not_finite_is_the_problem_of_the_rank_that_has_it(tmp_path):
    full = torch.zeros(4, 6)
    full[3, 1] = torch.nan
    save_file({"a": full}, tmp_path / "w.safetensors")
    weights = open_weights(tmp_path / "w.safetensors", "PATH")
    weights.fill(torch.empty(4, 3), "a", Placement(1), 1, 2)
    with pytest.raises(MegaSoraError, match="PATH: a is float32, or some"):
        weights.fill(torch.empty(4, 3), "a", Placement(1), 0, 2)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(SHAPE)}, path)
    weights = open_weights(path, "PATH")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(MegaSoraError, match=f"PATH cannot be read: {path} was truncated"):
        weights.fill(torch.empty(SHAPE), "a")


# ---------------------------------------------------------------------- folders


def folder_of(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    folder, values = tmp_path / "model", {name: torch.randn(SHAPE) for name in "abcd"}
    folder.mkdir()
    write_parts(folder, "model", {name: SHAPE for name in values}, values.__getitem__, shard_bytes=32)
    return folder, values


def test_a_folder_with_an_index_is_read_like_a_file(tmp_path):
    folder, values = folder_of(tmp_path)
    assert len(list(folder.glob("*.safetensors"))) == 2
    check_initial_weights(config_of(folder))
    for name, value in values.items():
        assert torch.equal(read(folder, name), value)
    (tmp_path / "one").mkdir()
    save_file({"a": values["a"]}, tmp_path / "one" / "any.safetensors")
    check_initial_weights(config_of(tmp_path / "one"))
    assert torch.equal(read(tmp_path / "one"), values["a"])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder, index: (folder / "model-00002-of-00002.safetensors").unlink(), "No such file"),
        (
            lambda folder, index: index["weight_map"].update(a="../w.safetensors"),
            "'../w.safetensors', which is none of",
        ),
        (lambda folder, index: index["weight_map"].update(a="model.pth"), "'model.pth', which is none of its folder"),
        (lambda folder, index: index["weight_map"].update(a="model-00002-of-00002.safetensors"), "has no tensor 'a'"),
        (lambda folder, index: index["weight_map"].update(a=3), "cannot be read"),
        (lambda folder, index: index.pop("weight_map"), "cannot be read"),
        (
            lambda folder, index: (folder / "b.safetensors.index.json").write_text("{}"),
            "it has 2 files *.safetensors.i",
        ),
    ],
)
def test_a_damaged_folder_is_one_line(damage, words, tmp_path):
    folder, _ = folder_of(tmp_path)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    damage(folder, index)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    check_error(folder, words)


def test_a_folder_without_weights_is_refused_before_anything_starts(tmp_path):
    (tmp_path / "empty").mkdir()
    check_error(tmp_path / "empty", "it is a folder without *.safetensors.index.json or *.safetensors")
    with pytest.raises(MegaSoraError, match="an empty folder, and no safetensors file"):
        check_initial_weights(config_of(tmp_path / "empty"))


# ---------------------------------------------------------------------- a resumed run


def test_the_weights_of_a_resumed_run_are_not_drawn_but_those_that_are_not_trained(tmp_path):
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    settings = [f"run.dir={tmp_path}"]
    weights = initial_weights(load(None, settings))
    assert isinstance(weights, WeightsToLoad)
    trained, frozen = (torch.nn.Parameter(torch.zeros(4, 4), requires_grad=r) for r in (True, False))
    for parameter in (trained, frozen):
        weights.fill(parameter, "blocks.0.mlp.up.weight")
    expected = torch.empty(4, 4)
    DrawnWeights(load(None, settings).run.seed).fill(expected, "blocks.0.mlp.up.weight")
    assert trained.isnan().all() and torch.equal(frozen, expected)
    for start, kind in ((f"init:{tmp_path / 'none'}", None), ("fresh", DrawnWeights)):  # begin, whatever there is
        if kind is None:
            with pytest.raises(MegaSoraError, match="cannot be read"):
                initial_weights(load(None, [*settings, f"run.start={start}"]))
        else:
            assert type(initial_weights(load(None, [*settings, f"run.start={start}"]))) is kind
    assert type(initial_weights(load(None, [f"run.dir={tmp_path / 'new'}"]))) is DrawnWeights


# ---------------------------------------------------------------------- several ranks of a machine


def read_on_ranks(folder: str, local_sizes: list[int]) -> list[tuple]:
    """For each number of ranks of a machine: (the weight, bytes that this rank has read, the error for a weight that is
    not finite, process groups that are left, headers that this rank has read, the error for a missing file)."""
    from megasora.config import ParallelConfig
    from megasora.parallel.mesh import build_mesh

    rank, size = dist.get_rank(), dist.get_world_size()
    mesh, sizes, read_into, results = build_mesh(ParallelConfig(), "cpu"), [], foreign_file.read_into, []

    def counted(handle, offset, out, path):
        sizes.append(out.nbytes)
        read_into(handle, offset, out, path)

    foreign_file.read_into = counted
    for local_size in local_sizes:
        world = World(rank, size, rank % local_size, local_size, torch.device("cpu"))
        out, problem = torch.nn.Parameter(torch.zeros(5, 7)), ""
        sizes.clear()
        opened = []

        def open_file(name: str, opened: list[str] = opened) -> FileWeights:
            opened.append(name)
            return open_weights(Path(folder) / name, "PATH")

        weights = open_on_node(lambda opener=open_file: opener("w.safetensors"), world)
        with pytest.raises(MegaSoraError) as missing:
            open_on_node(lambda opener=open_file: opener("missing"), world)
        groups = len(dist.distributed_c10d._world.pg_names)
        with shared_reads(weights, world, mesh.data_context) as shared:
            assert isinstance(shared, SharedReads if local_size > 1 else FileWeights)
            shared.fill(out, "a")
            num_bytes = sum(sizes)
            try:
                shared.fill(torch.empty(3), "b")
            except MegaSoraError as error:
                problem = str(error)
        left = len(dist.distributed_c10d._world.pg_names) - groups
        results.append((out.detach(), num_bytes, problem, left, len(opened), str(missing.value)))
    return results


def test_a_weight_is_read_once_on_each_machine(tmp_path):
    full = torch.randn(5, 7)
    save_file({"a": full, "b": torch.full((3,), torch.inf)}, tmp_path / "w.safetensors")
    readers = {4: [0], 2: [0, 2], 1: [0, 1, 2, 3]}  # by the ranks of a machine
    for rank, results in enumerate(run_ranks(read_on_ranks, 4, str(tmp_path), list(readers))):
        for local_size, (weight, num_bytes, problem, left, opened, missing) in zip(readers, results, strict=True):
            assert torch.equal(weight, full) and left == 0
            assert opened == (2 if rank in readers[local_size] else 0) and "PATH cannot be read: [Errno 2]" in missing
            assert num_bytes == (full.nbytes if rank in readers[local_size] else 0)
            assert problem.startswith("PATH: b is float32, or some of its weights are NaN or infinite")
