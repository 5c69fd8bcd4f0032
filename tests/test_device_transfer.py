"""Objects of tensors move to a device as they are, in one buffer."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from megasora.device_transfer import ALIGNMENT, ON_CPU, DeviceTransfer, map_tensors, to_device
from megasora.testing.host_waits import HostWaits


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclass(frozen=True)
class Offsets:
    starts: Tensor
    planned: Tensor = field(metadata=ON_CPU)
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    later: Tensor | None = field(default=None, init=False)

    @cached_property
    def lengths(self) -> Tensor:
        return self.starts.diff()


def make_value():
    draw = torch.Generator().manual_seed(0)
    shared = torch.randn(7, 3, generator=draw).bfloat16()
    offsets = Offsets(torch.arange(5, dtype=torch.int32), torch.arange(3))
    assert offsets.lengths.tolist() == [1] * 4  # cached from here on
    return {
        "a": [shared, torch.tensor(2.5, dtype=torch.float64), "text", None],
        "b": Pair(offsets, (torch.zeros(0, 4), torch.tensor([True, False, True]), shared)),
        "c": torch.randn(6, 5, generator=draw).t(),  # not contiguous
        "d": shared[2:5],
    }


def tensors_of(value):
    found = []
    map_tensors(value, lambda x: found.append(x) or x, torch.device("cpu"))
    return found


def send(value, transfer):
    return transfer(transfer.pack(value)).wait()


def forced_copy():
    transfer = DeviceTransfer("cpu")
    transfer.copies = True  # as if the CPU were another device
    return transfer


def test_a_transfer_keeps_values_shapes_and_dtypes():
    value = make_value()
    moved = send(value, forced_copy())
    assert moved["a"][2:] == ["text", None] and isinstance(moved["b"], Pair)
    for x, y in zip(tensors_of(value), tensors_of(moved), strict=True):
        assert torch.equal(x, y) and x.dtype == y.dtype and x.data_ptr() != y.data_ptr() or not x.numel()


def test_all_tensors_share_one_buffer_and_begin_where_kernels_can_load_them():
    value = make_value()
    transfer = forced_copy()
    sent = transfer(transfer.pack(value))
    storage = sent.buffer.untyped_storage().data_ptr()
    starts = {x.data_ptr() - storage for x in tensors_of(sent.wait()) if x.numel()}
    assert all(start % ALIGNMENT == 0 and 0 <= start < sent.buffer.nbytes for start in starts)
    assert len(starts) == len({id(x) for x in tensors_of(value) if x.numel()})  # one is there twice


def test_it_is_one_copy_to_the_device():
    transfer = DeviceTransfer("meta")
    with HostWaits() as found:
        packed = transfer.pack(make_value())
    assert not found.copies
    with HostWaits() as found:
        moved = transfer(packed).wait()
    assert len(found.copies) == 1 and not found.waits
    assert all(x.is_meta for x in tensors_of(moved))


def test_on_a_cpu_nothing_is_copied():
    value = make_value()
    assert send(value, DeviceTransfer("cpu")) is value


def test_what_is_packed_is_on_the_cpu_with_the_same_values_and_can_be_sent_again():
    value, transfer = make_value(), forced_copy()
    packed = transfer.pack(value)
    first, second = (transfer(packed).wait() for _ in range(2))
    for x, y, z, w in zip(*map(tensors_of, (value, packed.value, first, second)), strict=True):
        assert torch.equal(x, y) and torch.equal(x, z) and torch.equal(x, w)
        assert len({x.data_ptr(), y.data_ptr(), z.data_ptr(), w.data_ptr()}) == 4 or not x.numel()
    assert packed.value["b"].first.device == torch.device("cpu")


@pytest.mark.parametrize("move", [to_device, lambda value, device: send(value, DeviceTransfer(device))])
def test_fields_of_the_cpu_stay_and_the_device_is_the_new_one(move):
    offsets = move(make_value(), "meta")["b"].first
    assert offsets.planned.tolist() == [0, 1, 2] and offsets.device == torch.device("meta")
    assert offsets.starts.is_meta and offsets.lengths.is_meta and offsets.later is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_transfers_to_a_gpu_arrive_while_it_computes_and_the_host_waits_for_nothing():
    transfer, value = DeviceTransfer("cuda"), make_value()
    send(value, transfer)  # allocates memory
    packed = [transfer.pack(value) for _ in range(20)]
    busy = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = []
        for each in packed:
            busy = busy @ busy / 64
            results.append(transfer(each).wait())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for moved in results:
        for x, y in zip(tensors_of(value), tensors_of(moved), strict=True):
            assert torch.equal(x, y.cpu())
