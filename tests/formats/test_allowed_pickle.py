"""Pickles of other programs: what the tables allow is read as torch reads it; everything else is named, and not run."""

from __future__ import annotations

import collections
import io
import os
import pickle
import zipfile

import pytest
import torch

from megasora.errors import MegaSoraError
from megasora.formats.allowed_pickle import TENSORS, Record, StoredTensor, load_pickle, load_torch, record


class Payload:
    """Pickled as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def open_torch(path, allowed=TENSORS):
    with open(path, "rb", buffering=0) as file:
        return load_torch(file, path, allowed)


def read_pickle(data, allowed=TENSORS, path="a.pkl"):
    return load_pickle(io.BytesIO(data), path, allowed)


def test_tensors_are_those_that_torch_loads(tmp_path):
    path = tmp_path / "a.pt"
    base = torch.arange(24.0).view(4, 6)
    values = {
        "plain": base, "transposed": base.t(), "slice": base[1:3, ::2], "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3), "bf16": torch.randn(5).bfloat16(), "bool": torch.tensor([True, False]),
        "parameter": torch.nn.Parameter(base), "list": [1, "a", (2.5, None)], "dtype": torch.float16,
    }  # fmt: skip
    torch.save(collections.OrderedDict(values), path)
    loaded, expected = open_torch(path), torch.load(path, weights_only=True)
    assert loaded.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            read = loaded[name].read()
            assert read.dtype == value.dtype and torch.equal(read, value), name
        else:
            assert loaded[name] == value
    assert torch.equal(loaded["plain"].read_elements(5, 3), torch.tensor([5.0, 6.0, 7.0]))
    with pytest.raises(ValueError):
        loaded["plain"].read_elements(20, 5)


def test_a_state_dict_of_a_module_is_read(tmp_path):
    path, module = tmp_path / "a.pt", torch.nn.Linear(2, 3)
    torch.save(module.state_dict(), path)  # an OrderedDict with a state, its versions
    loaded = open_torch(path)
    assert all(torch.equal(loaded[name].read(), value) for name, value in module.state_dict().items())


def test_objects_of_a_class_become_records_without_the_class():
    data = pickle.dumps({"a": collections.Counter("xx"), "z": zipfile.ZipInfo("name")})
    allowed = {name: record(name) for name in ("collections.Counter", "zipfile.ZipInfo", "builtins.getattr")}
    loaded = read_pickle(data, allowed)
    assert isinstance(loaded["a"], Record) and loaded["a"].args == ({"x": 2},)
    assert type(loaded["z"]).__name__ == "ZipInfo"


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch {}",), r"(posix|nt)\.system"),
        (eval, ("open({!r}, 'w')",), r"(builtins|__builtin__)\.eval"),
        (os.open, ("{}", os.O_CREAT), r"(posix|nt)\.open"),
        (torch.load, ("{}",), r"torch\.serialization\.load"),
    ],
)
def test_code_in_a_pickle_is_named_and_not_run(protocol, function, arguments, name, tmp_path):
    victim = tmp_path / "victim"
    payload = Payload(function, *(a.format(str(victim)) if isinstance(a, str) else a for a in arguments))
    data = pickle.dumps([1, payload], protocol)
    with pytest.raises(MegaSoraError, match=f"a.pkl holds {name}, which is not loaded") as error:
        read_pickle(data)
    assert len(str(error.value).splitlines()) == 1 and not victim.exists()

    path = tmp_path / "a.pt"
    torch.save({"a": torch.ones(3), "b": payload}, path)
    with pytest.raises(MegaSoraError, match=f"a.pt holds {name}"):
        open_torch(path)
    assert not victim.exists()
    if function is not torch.load:
        pickle.loads(data)  # the payload would have made the file
        assert victim.exists()


def test_names_with_dots_and_extensions_reach_nothing():
    assert "collections.OrderedDict" in TENSORS
    for data, name in (
        (b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.", r"OrderedDict\.__init__"),
        (b"\x80\x02ccollections\nnamedtuple\n.", r"collections\.namedtuple"),
        (b"\x80\x02cos\nsystem\x1b[2J\n.", r"os\.system\\x1b\[2J"),
        (b"\x80\x02\x82\x01.", "the registered extension 1"),
    ):
        with pytest.raises(MegaSoraError, match=name):
            read_pickle(data)


def test_a_pickle_cannot_change_the_table():
    """BUILD sets attributes, which of a function or a class would change it for all later files."""
    function = TENSORS["torch._utils._rebuild_tensor_v2"]
    for name in ("torch._utils\n_rebuild_tensor_v2", "torch\nFloatStorage", "torch\nfloat32"):
        for state in (b"}X\x05\x00\x00\x00dtypeK\x07s", b"N}X\x0c\x00\x00\x00__defaults__NsX\x00\x00\x00\x000\x86"):
            with pytest.raises(MegaSoraError, match="cannot be read"):
                read_pickle(b"\x80\x02c" + name.encode() + b"\n" + state + b"b.")
    assert TENSORS["torch.FloatStorage"].dtype is torch.float32 and not vars(function)


def test_no_damage_is_more_than_one_line(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"a": torch.arange(6.0), "b": [1, 2]}, path)
    good = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        data = bytearray(good)
        for _ in range(3):
            place = int(torch.randint(len(data), (), generator=generator))
            data[place] = int(torch.randint(256, (), generator=generator))
        path.write_bytes(data[: int(torch.randint(len(data) // 2, 2 * len(data), (), generator=generator))])
        try:
            loaded = open_torch(path)
            for value in loaded.values() if isinstance(loaded, dict) else ():
                if isinstance(value, StoredTensor):
                    value.read()
        except MegaSoraError as error:
            assert len(str(error).splitlines()) == 1 and str(path) in str(error)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\x80", b"not a pickle", b"\x80\x02" + b"(" * 50 + b".", b"\x80\x02]", pickle.dumps([1] * 99)[:-9],
        b"\x80\x04\x8d" + b"\xff" * 8, b"\x80\x02r\xff\xff\xff\x7f.", b"\x80\x02N" + b"r\xff\xff\xff\x7f" * 2,
        b"\x80\x02ctorch\nSize\n](J\xff\xff\xff\xffe\x85R.", b"\x80\x02X\x01\x00\x00\x00aQ.",
        b"\x80\x02ctorch\nSize\n](\x8a\x08" + b"\xff" * 7 + b"\x7fe\x85R.",
    ],
)  # fmt: skip
def test_what_is_no_pickle_is_said(data):
    with pytest.raises(MegaSoraError, match=r"^a\.pkl cannot be read: .*; copy or save it again$"):
        read_pickle(data)


def test_a_large_memo_index_takes_no_memory():
    assert read_pickle(b"\x80\x02Nr\xff\xff\xff\x7f.") is None  # the unpickler in C asks for 32 GiB


def archive(path, pickled, storages=(), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("a/data.pkl", pickled)
        for name, data in storages:
            file.writestr(f"a/data/{name}", data)


def tensor_pickle(shape, stride, count, start=0):
    data, storage = io.BytesIO(), Payload(None)

    class Storage(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", count) if value is storage else None

    Storage(data, 2).dump(
        Payload(torch._utils._rebuild_tensor_v2, storage, start, shape, stride, False, collections.OrderedDict())
    )
    return data.getvalue()


def test_a_tensor_is_within_its_storage(tmp_path):
    path, four = tmp_path / "a.pt", b"\0" * 16
    archive(path, tensor_pickle((2, 2), (2, 1), 4), [("0", four)])
    assert open_torch(path).read().tolist() == [[0, 0], [0, 0]]
    for pickled, storages, words in (
        (tensor_pickle((2, 3), (3, 1), 4), [("0", four)], "a tensor of shape"),
        (tensor_pickle((2, 2), (2, 1), 4, start=1), [("0", four)], "a tensor of shape"),
        (tensor_pickle((2, 2), (2, 1), 4, start=-1), [("0", four)], "a tensor of shape"),
        (tensor_pickle((10**9,), (0,), 4), [("0", four)], "a tensor of shape"),
        (tensor_pickle((2, 2), (2,), 4), [("0", four)], "a tensor of shape"),
        (tensor_pickle((2, 2), (2, 1), 5), [("0", four)], "a storage of 16 bytes for 5 elements"),
        (tensor_pickle((2, 2), (2, 1), 4), [], "damaged data"),
    ):
        archive(path, pickled, storages)
        with pytest.raises(MegaSoraError, match=words):
            open_torch(path)
    archive(path, tensor_pickle((2, 2), (2, 1), 4), [("0", four)], zipfile.ZIP_DEFLATED)
    with pytest.raises(MegaSoraError, match="data/0 is compressed"):
        open_torch(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "a.pt"
    torch.save([1], path, _use_new_zipfile_serialization=False)
    with pytest.raises(MegaSoraError, match="a.pt cannot be read: File is not a zip file"):
        open_torch(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/other", "x")
    with pytest.raises(MegaSoraError, match="a.pt cannot be read"):
        open_torch(path)
