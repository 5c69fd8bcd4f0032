"""Values of the device on the host, without a wait of either for the other until they are read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def numbers_on(values: Sequence[float], device: torch.device) -> Tensor:
    """fp64 [n] on the device, by a copy that the host does not wait for."""
    on_gpu = device.type == "cuda"
    return torch.tensor(values, dtype=torch.float64, pin_memory=on_gpu).to(device, non_blocking=True)


class DeviceNumbers:
    """A copy of a tensor [n] as it is now, in the order of the current stream."""

    def __init__(self, values: Tensor):
        self.copied: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.values.copy_(values, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()
        else:
            self.values = values.clone()

    def read(self) -> list[float]:
        """The values; waits until the device has computed them."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.values.tolist()
