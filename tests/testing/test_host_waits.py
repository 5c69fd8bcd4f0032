"""What makes a host wait for a GPU is found, without a GPU; what does not, is not."""

import pytest
import torch

from megasora.testing.host_waits import HostWaits


def on_device(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, device="meta")


WAITS = {
    "item": lambda x: x.sum().item(),
    "int": lambda x: int(x.sum()),
    "bool": lambda x: bool(x.any()),
    "if": lambda x: 1 if x.sum() > 0 else 2,
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "copy to the CPU": lambda x: torch.zeros(3).copy_(x),
    "mask": lambda x: x[x > 0],
    "assignment to a mask": lambda x: x.__setitem__(x > 0, 1.0),
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "repeats of unknown sum": lambda x: x.repeat_interleave(on_device(3, dtype=torch.int64)),
}
COPIES = {
    "to": lambda x: torch.arange(3).to(x.device),
    "to, non-blocking": lambda x: torch.arange(3).to(x.device, non_blocking=True),
    "copy_": lambda x: x.copy_(torch.zeros(3)),
    "index on the CPU": lambda x: x[torch.tensor([0, 1])],
    "tensor of numbers": lambda x: torch.tensor([1, 2], device=x.device),
}
NEITHER = {
    "arithmetic": lambda x: (x + 1).double().sum() / 3,
    "full": lambda x: torch.full((), 3, device=x.device),
    "where": lambda x: x.where(x > 0, 0),
    "index": lambda x: x[on_device(2, dtype=torch.int64)],
    "repeats of known sum": lambda x: x.repeat_interleave(on_device(3, dtype=torch.int64), output_size=5),
    "number of the host": lambda x: x * torch.tensor(2.0),
    "work of the host": lambda x: int(torch.arange(3)[torch.tensor([1])]),
    "backward": lambda x: (x.requires_grad_() ** 2).sum().backward(),
}


def find(function):
    with HostWaits() as found:
        try:
            function(on_device(3))
        except (NotImplementedError, RuntimeError):  # no values, no result
            pass
    return found


@pytest.mark.parametrize("name", WAITS)
def test_a_number_that_the_host_needs_is_a_wait(name):
    found = find(WAITS[name])
    assert len(found.waits) == 1 and not found.copies
    assert found.waits[0].line.startswith(__file__)


@pytest.mark.parametrize("name", COPIES)
def test_memory_of_the_host_that_the_device_reads_is_a_copy(name):
    found = find(COPIES[name])
    assert len(found.copies) == 1 and not found.waits


@pytest.mark.parametrize("name", NEITHER)
def test_other_operations_are_neither(name):
    found = find(NEITHER[name])
    assert not found.waits and not found.copies


def test_it_goes_on_after_a_wait_with_some_value():
    with HostWaits() as found:
        x = on_device(4)
        assert isinstance(int(x.sum()), int) and x.cpu().shape == (4,)
        x.sum().item()
    assert len(found.waits) == 3 and found.operations > 0
