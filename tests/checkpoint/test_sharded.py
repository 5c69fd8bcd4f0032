"""A sharded checkpoint of any layout loads in any other; missing and duplicate elements raise."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megasora.checkpoint.block_file import DIGEST_BYTES, digest_of
from megasora.checkpoint.damage import DamagedCheckpoint
from megasora.checkpoint.fragment_file import METADATA, FragmentFile
from megasora.checkpoint.manifest import MANIFEST, write_manifest
from megasora.checkpoint.safetensors_file import write_tensors
from megasora.checkpoint.sharded import RankFile, ShardedCheckpoint, export
from megasora.errors import MegaSoraError
from megasora.fragment import Fragment
from megasora.placement import Placement

KINDS = ("weights", "ema")
WEIGHTS = {  # name: (full shape, placement on a tensor axis)
    "qkv.weight": ((12, 5), Placement(shard_dim=0, num_chunks=3)),
    "out.weight": ((3, 8), Placement(shard_dim=1)),
    "norm.weight": ((4,), Placement(shard_dim=0)),
    "out.bias": ((7,), Placement(partial_axes=("tensor",))),
    "scale": ((), Placement()),
}


def full(kind, name):
    shape = WEIGHTS[name][0]
    first = 1000 * KINDS.index(kind) + 100 * list(WEIGHTS).index(name)
    return torch.arange(first, first + torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def fragments_of(tensor, cuts):
    """The fragments of each rank, tensor axis innermost. `cuts` (0 to 1) split each local tensor over data ranks."""
    ranks = []
    for data_rank in range(len(cuts) + 1):
        for tensor_rank in range(tensor):
            fragments = []
            for name, (shape, placement) in WEIGHTS.items():
                placement = placement if tensor > 1 else Placement()
                local = {kind: placement.local(full(kind, name), tensor_rank, tensor).reshape(-1) for kind in KINDS}
                ends = [0, *(round(cut * len(local["ema"])) for cut in sorted(cuts)), len(local["ema"])]
                start, end = ends[data_rank], ends[data_rank + 1]
                if end > start:
                    values = {kind: tensor_L[start:end].clone() for kind, tensor_L in local.items()}
                    fragments.append(Fragment(name, torch.Size(shape), placement, tensor_rank, tensor, start, values))
            ranks.append(fragments)
    return ranks


def primary_replicas(fragments):
    return [f for f in fragments if f.placement.shard_dim is not None or f.tensor_rank == 0]


def write(folder, ranks):
    """A checkpoint below `folder`."""
    checkpoint = folder / "step-00000001"
    checkpoint.mkdir()
    for rank, fragments in enumerate(ranks):
        file = RankFile(rank, primary_replicas(fragments))
        file.write(checkpoint, file.values)
    write_manifest_of(checkpoint)
    return checkpoint


def table_bytes(data):
    """Of the digests of the header and of one block, if there are tensors."""
    tensors = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).keys() - {"__metadata__", "digests"}
    return DIGEST_BYTES * (2 if tensors else 1)


def write_manifest_of(checkpoint):
    files = {
        p.relative_to(checkpoint).as_posix(): p.read_bytes() for p in checkpoint.rglob("*.*") if p.name != MANIFEST
    }
    entries = {name: (len(data), digest_of(data[-table_bytes(data) :]).hex()) for name, data in files.items()}
    write_manifest(checkpoint, 1, entries)


LAYOUT = st.tuples(st.sampled_from([1, 2, 4]), st.lists(st.floats(0, 1), max_size=3))


@settings(deadline=None, max_examples=60)
@given(LAYOUT, LAYOUT)
def test_a_checkpoint_of_one_layout_loads_bit_for_bit_in_any_other(saved, loading):
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = ShardedCheckpoint(write(Path(folder), fragments_of(*saved)))
        assert checkpoint.kinds == set(KINDS)
        assert checkpoint.shapes == {name: torch.Size(shape) for name, (shape, _) in sorted(WEIGHTS.items())}
        for name in WEIGHTS:
            for kind in KINDS:
                assert torch.equal(checkpoint.full_tensor(kind, name), full(kind, name))
        for rank in fragments_of(*loading):
            for f in rank:
                expected = {kind: values.clone() for kind, values in f.values.items()}
                for values in f.values.values():
                    values.fill_(-1)
                checkpoint.load_into([f])
                assert all(torch.equal(f.values[kind], expected[kind]) for kind in KINDS)


def test_only_the_bytes_of_a_fragment_are_read_if_the_sharding_is_unchanged(tmp_path, monkeypatch):
    checkpoint, read = ShardedCheckpoint(write(tmp_path, fragments_of(2, [0.5]))), []
    original = FragmentFile.read

    def recording_read(file, offset, out):
        read.append((file.path.name, len(out)))
        original(file, offset, out)

    monkeypatch.setattr(FragmentFile, "read", recording_read)
    for fragment in fragments_of(2, [0.25, 0.75])[3]:  # the second tensor rank's, of the second data rank
        read.clear()
        assert torch.equal(checkpoint.read_fragment("ema", fragment), fragment.values["ema"])
        assert sum(count for _, count in read) == fragment.count
        if fragment.name == "qkv.weight":  # half of each of the two fragments of this tensor rank
            assert read == [(f"rank-0000{rank}.safetensors", 7) for rank in (1, 3)]


def test_a_parameter_with_another_sharding_is_assembled_first(tmp_path):
    checkpoint = ShardedCheckpoint(write(tmp_path, fragments_of(2, [])))
    (first, *_) = fragments_of(2, [])[1]
    full_values = full("ema", "qkv.weight")
    for placement in (Placement(shard_dim=0, num_chunks=3), Placement()):
        local = placement.local(full_values, 1, 2).reshape(-1)
        fragment = dataclasses.replace(first, placement=placement, values={"ema": local})
        assert torch.equal(checkpoint.read_fragment("ema", fragment), local)


def test_an_export_is_a_safetensors_file_of_full_tensors(tmp_path):
    checkpoint, sizes = ShardedCheckpoint(write(tmp_path, fragments_of(4, [0.3, 0.6]))), []
    export(checkpoint, "weights", tmp_path / "out.safetensors", sizes.append)
    tensors = load_file(tmp_path / "out.safetensors")
    assert tensors.keys() == WEIGHTS.keys() and all(
        torch.equal(tensors[name], full("weights", name)) for name in WEIGHTS
    )
    assert sizes == [4 * tensors[name].numel() for name in sorted(tensors)]


def test_a_file_of_fragments_is_a_safetensors_file(tmp_path):
    tensors = load_file(write(tmp_path, fragments_of(1, [])) / "fragments" / "rank-00000.safetensors")
    assert tensors.pop("digests").shape == (2, DIGEST_BYTES)
    assert tensors.keys() == {f"{kind}/{name}" for kind in KINDS for name in WEIGHTS}
    assert all(values.dtype == torch.float32 and values.ndim == 1 for values in tensors.values())


# ---------------------------------------------------------------- errors


def missing_rank(ranks):
    ranks[2] = []


def duplicate(ranks):
    ranks.append(ranks[0])


def overlapping(ranks):
    ranks[2] = [dataclasses.replace(f, start=f.start - 1) if f.name == "qkv.weight" else f for f in ranks[2]]


def another_shape(ranks):
    ranks[2] = [dataclasses.replace(f, shape=torch.Size((12, 6))) if f.name == "qkv.weight" else f for f in ranks[2]]


def another_sharding(ranks):
    by_one_chunk = Placement(shard_dim=0)
    ranks[2] = [dataclasses.replace(f, placement=by_one_chunk) if f.name == "qkv.weight" else f for f in ranks[2]]


def missing_kind(ranks):
    ranks[2] = [dataclasses.replace(f, values={"ema": f.values["ema"]}) for f in ranks[2]]


def different_counts(ranks):
    ranks[2] = [dataclasses.replace(f, values={**f.values, "ema": f.values["ema"][1:]}) for f in ranks[2]]


@pytest.mark.parametrize(
    "spoil", [missing_rank, duplicate, overlapping, another_shape, another_sharding, missing_kind, different_counts]
)
def test_fragments_that_do_not_cover_each_parameter_once_raise_with_file_and_parameter(spoil, tmp_path):
    ranks = fragments_of(2, [0.5])
    spoil(ranks)
    with pytest.raises(DamagedCheckpoint, match=r"rank-0000\d.safetensors.* qkv.weight .*use an earlier") as error:
        ShardedCheckpoint(write(tmp_path, ranks))
    assert str(tmp_path) in str(error.value)


def test_a_checkpoint_without_fragments_raises(tmp_path):
    (checkpoint := write(tmp_path, [[]])).joinpath("fragments", "rank-00000.safetensors").unlink()
    write_manifest_of(checkpoint)
    with pytest.raises(DamagedCheckpoint, match="manifest.json names no fragments/rank-XXXXX.safetensors"):
        ShardedCheckpoint(checkpoint)


def test_a_fragment_that_was_not_saved_raises_with_both_shapes(tmp_path):
    checkpoint = ShardedCheckpoint(write(tmp_path, fragments_of(1, [])))
    (first, *_) = fragments_of(1, [])[0]
    changed = {
        "none": dataclasses.replace(first, name="other.weight"),
        r"\[12, 5\]": dataclasses.replace(first, shape=torch.Size((6, 10))),
        r"\[12, 5\] with ema, weights": dataclasses.replace(first, values={"exp_avg": first.values["ema"]}),
    }
    for words, fragment in changed.items():
        with pytest.raises(MegaSoraError, match=f"{fragment.name} .* cannot be loaded, the checkpoint has {words}"):
            checkpoint.load_into([fragment])


def with_metadata(data, fragments):
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    entries["__metadata__"][METADATA] = json.dumps(fragments)
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: data[:100],
        lambda data: b"",
        lambda data: (1 << 60).to_bytes(8, "little") + data[8:],
        lambda data: data[:8] + b"[" + data[9:],
        lambda data: data.replace(b'"F32"', b'"F16"', 1),
        lambda data: data.replace(METADATA.encode(), b"ffragment", 1),
        lambda data: with_metadata(data, {}),
        lambda data: with_metadata(data, []),
        lambda data: with_metadata(data, {"scale": 3}),
        lambda data: (100_000).to_bytes(8, "little") + b"[" * 100_000,
    ],
)
def test_an_invalid_file_raises_with_its_name(change, tmp_path):
    checkpoint = write(tmp_path, fragments_of(1, []))
    file = checkpoint / "fragments" / "rank-00000.safetensors"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(DamagedCheckpoint, match=r"rank-00000.safetensors .*; use an earlier"):
        ShardedCheckpoint(checkpoint)


def test_tensors_are_computed_one_after_the_other_and_a_failure_leaves_no_file(tmp_path):
    requested = []

    def value_of(name):
        requested.append(name)
        if name == "c":
            raise KeyError(name)
        return torch.ones(2)

    with pytest.raises(KeyError):
        write_tensors(tmp_path / "a.safetensors", dict.fromkeys("abc", torch.Size([2])), value_of, {})
    assert requested == ["a", "b", "c"] and not list(tmp_path.iterdir())
