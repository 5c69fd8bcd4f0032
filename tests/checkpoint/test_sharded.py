"""Slices of one layout are the tensors they were cut from, to any other; what is missing or twice is refused."""

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

from megasora.checkpoint.sharded import METADATA, ShardedCheckpoint, export, write_fragments
from megasora.checkpoint.safetensors_file import TensorFile, write_tensors
from megasora.errors import MegaSoraError
from megasora.fragment import Fragment
from megasora.placement import Placement

KINDS = ("weights", "ema")
WEIGHTS = {  # name: (full shape, where a tensor axis cuts it)
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
    """Of each rank, tensor innermost: what it owns where `cuts` (0 to 1) divide each part over its data ranks."""
    ranks = []
    for number in range(len(cuts) + 1):
        for tensor_rank in range(tensor):
            here = []
            for name, (shape, placement) in WEIGHTS.items():
                placement = placement if tensor > 1 else Placement()
                parts = {kind: placement.local(full(kind, name), tensor_rank, tensor).reshape(-1) for kind in KINDS}
                ends = [0, *(round(cut * len(parts["ema"])) for cut in sorted(cuts)), len(parts["ema"])]
                start, end = ends[number], ends[number + 1]
                if end > start:
                    values = {kind: part[start:end].clone() for kind, part in parts.items()}
                    here.append(Fragment(name, torch.Size(shape), placement, tensor_rank, tensor, start, values))
            ranks.append(here)
    return ranks


def counting(fragments):
    return [f for f in fragments if f.placement.shard_dim is not None or f.tensor_rank == 0]


def write(folder, ranks):
    folder.mkdir(exist_ok=True)
    for rank, fragments in enumerate(ranks):
        write_fragments(folder, rank, counting(fragments))
    return folder


LAYOUT = st.tuples(st.sampled_from([1, 2, 4]), st.lists(st.floats(0, 1), max_size=3))


@settings(deadline=None, max_examples=60)
@given(LAYOUT, LAYOUT)
def test_what_one_layout_writes_any_other_reads_bit_by_bit(saved, ours):
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = ShardedCheckpoint(write(Path(folder), fragments_of(*saved)))
        assert checkpoint.kinds == set(KINDS)
        assert checkpoint.shapes == {name: torch.Size(shape) for name, (shape, _) in sorted(WEIGHTS.items())}
        for name in WEIGHTS:
            for kind in KINDS:
                assert torch.equal(checkpoint.full_tensor(kind, name), full(kind, name))
        for rank in fragments_of(*ours):
            for f in rank:
                expected = {kind: values.clone() for kind, values in f.values.items()}
                for values in f.values.values():
                    values.fill_(-1)
                checkpoint.load_into(f)
                assert all(torch.equal(f.values[kind], expected[kind]) for kind in KINDS)


def test_only_the_bytes_of_a_fragment_are_read_where_the_parameter_is_cut_as_it_was(tmp_path, monkeypatch):
    checkpoint, read = ShardedCheckpoint(write(tmp_path, fragments_of(2, [0.5]))), []
    original = TensorFile.read

    def noted(file, name, start, count):
        read.append((file.path.name, name, count))
        return original(file, name, start, count)

    monkeypatch.setattr(TensorFile, "read", noted)
    for fragment in fragments_of(2, [0.25, 0.75])[3]:  # the second tensor rank's, of the second data rank
        read.clear()
        found = checkpoint.read_fragment("ema", fragment)
        assert torch.equal(found, fragment.values["ema"])
        assert sum(count for _, _, count in read) == fragment.count
        if fragment.name == "qkv.weight":  # half of what each of two ranks wrote of this tensor rank's part
            assert read == [(f"rank-0000{rank}.safetensors", "ema/qkv.weight", 7) for rank in (1, 3)]


def test_a_parameter_that_is_cut_in_other_runs_than_it_was_is_put_together_first(tmp_path):
    checkpoint = ShardedCheckpoint(write(tmp_path, fragments_of(2, [])))
    (first, *_) = fragments_of(2, [])[1]
    whole = full("ema", "qkv.weight")
    for placement in (Placement(shard_dim=0), Placement(shard_dim=0, num_chunks=2), Placement()):
        part = placement.local(whole, 1, 2).reshape(-1)
        fragment = dataclasses.replace(first, placement=placement, values={"ema": part})
        assert torch.equal(checkpoint.read_fragment("ema", fragment), part)


def test_an_export_is_a_file_of_whole_tensors_for_other_programs(tmp_path):
    checkpoint, told = ShardedCheckpoint(write(tmp_path, fragments_of(4, [0.3, 0.6]))), []
    export(checkpoint, "weights", tmp_path / "out.safetensors", told.append)
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == WEIGHTS.keys() and all(torch.equal(found[name], full("weights", name)) for name in WEIGHTS)
    assert told == [4 * found[name].numel() for name in sorted(found)]


def test_a_file_of_slices_is_a_safetensors_file(tmp_path):
    found = load_file(write(tmp_path, fragments_of(1, [])) / "fragments" / "rank-00000.safetensors")
    assert found.keys() == {f"{kind}/{name}" for kind in KINDS for name in WEIGHTS}
    assert all(values.dtype == torch.float32 and values.ndim == 1 for values in found.values())


# ---------------------------------------------------------------- refusals


def without_a_rank(ranks):
    ranks[2] = []


def twice(ranks):
    ranks.append(ranks[0])


def overlapping(ranks):
    ranks[2] = [dataclasses.replace(f, start=f.start - 1) if f.name == "qkv.weight" else f for f in ranks[2]]


def of_another_shape(ranks):
    ranks[2] = [dataclasses.replace(f, shape=torch.Size((12, 6))) if f.name == "qkv.weight" else f for f in ranks[2]]


def cut_otherwise(ranks):
    by_one_chunk = Placement(shard_dim=0)
    ranks[2] = [dataclasses.replace(f, placement=by_one_chunk) if f.name == "qkv.weight" else f for f in ranks[2]]


def of_another_kind(ranks):
    ranks[2] = [dataclasses.replace(f, values={"ema": f.values["ema"]}) for f in ranks[2]]


def uneven(ranks):
    ranks[2] = [dataclasses.replace(f, values={**f.values, "ema": f.values["ema"][1:]}) for f in ranks[2]]


@pytest.mark.parametrize(
    "spoil", [without_a_rank, twice, overlapping, of_another_shape, cut_otherwise, of_another_kind, uneven]
)
def test_slices_that_do_not_make_the_model_once_are_refused_with_file_and_parameter(spoil, tmp_path):
    ranks = fragments_of(2, [0.5])
    spoil(ranks)
    with pytest.raises(MegaSoraError, match=r"rank-0000\d.safetensors.* qkv.weight .*use an earlier") as refusal:
        ShardedCheckpoint(write(tmp_path, ranks))
    assert str(tmp_path) in str(refusal.value)


def test_a_folder_without_slices_is_refused(tmp_path):
    with pytest.raises(MegaSoraError, match="holds no rank-"):
        ShardedCheckpoint(tmp_path)


def test_a_fragment_that_was_not_saved_is_refused_with_both_shapes(tmp_path):
    checkpoint = ShardedCheckpoint(write(tmp_path, fragments_of(1, [])))
    (first, *_) = fragments_of(1, [])[0]
    changed = {
        "none": dataclasses.replace(first, name="other.weight"),
        r"\[12, 5\]": dataclasses.replace(first, shape=torch.Size((6, 10))),
        r"\[12, 5\] with ema, weights": dataclasses.replace(first, values={"exp_avg": first.values["ema"]}),
    }
    for words, fragment in changed.items():
        with pytest.raises(MegaSoraError, match=f"{fragment.name} .* cannot be loaded, the checkpoint has {words}"):
            checkpoint.load_into(fragment)


def spoiled(data, places):
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    entries["__metadata__"][METADATA] = json.dumps(places)
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
        lambda data: spoiled(data, {}),
        lambda data: spoiled(data, []),
        lambda data: spoiled(data, {"scale": 3}),
    ],
)
def test_a_file_that_is_none_is_refused_by_name(change, tmp_path):
    file = write(tmp_path, fragments_of(1, [])) / "fragments" / "rank-00000.safetensors"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(MegaSoraError, match=r"rank-00000.safetensors .*; use an earlier"):
        ShardedCheckpoint(tmp_path)


def test_tensors_are_asked_for_one_after_the_other_and_a_failure_leaves_no_file(tmp_path):
    asked = []

    def value_of(name):
        asked.append(name)
        if name == "c":
            raise KeyError(name)
        return torch.ones(2)

    with pytest.raises(KeyError):
        write_tensors(tmp_path / "a.safetensors", dict.fromkeys("abc", torch.Size([2])), value_of, {})
    assert asked == ["a", "b", "c"] and not list(tmp_path.iterdir())
