"""LPIPS, a perceptual distance of images: weighted squared differences of VGG16's features [arXiv 1801.03924].

The weights are one safetensors file, reconstruction.lpips_path: VGG16's convolutions with torchvision's names, the
linear weights with those of the package `lpips`. With both installed it is written by

    import lpips, torch, torchvision
    from safetensors.torch import save_file
    vgg = torchvision.models.vgg16(weights="IMAGENET1K_V1").state_dict()
    linear = torch.load(lpips.__path__[0] + "/weights/v0.1/vgg.pth", map_location="cpu")
    tensors = {name: w for name, w in vgg.items() if name.startswith("features.")} | linear
    save_file({name: w.float().contiguous() for name, w in tensors.items()}, "lpips_vgg16.safetensors")
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from megasora.errors import MegaSoraError, printable

# VGG16, configuration D [arXiv 1409.1556]: (index in torchvision's `features`, output channels) of the convolutions of
# each stage. A ReLU follows each convolution; between two stages the sides are halved by maxima.
STAGES = (
    ((0, 64), (2, 64)),
    ((5, 128), (7, 128)),
    ((10, 256), (12, 256), (14, 256)),
    ((17, 512), (19, 512), (21, 512)),
    ((24, 512), (26, 512), (28, 512)),
)
MIN_SIDE = 16  # pixels, at which the last stage has one position
MEAN, STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of the input, per colour, for values in [-1, 1]
EPS = 1e-10


class LPIPS(nn.Module):
    """[N, 3, H, W] in [-1, 1], twice -> distance of each pair, [N]. Its weights are buffers and are not trained.

    The mean over positions is taken per stage, then summed over stages. Images with a side below MIN_SIDE are extended
    by their last row or column.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        """`tensors`: those of `expected_shapes`."""
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name.replace(".", "_"), tensor.float())
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        total = x.new_zeros(len(x))
        with torch.no_grad():
            target = self.features(y.detach())
        for stage, (a, b) in enumerate(zip(self.features(x), target, strict=True)):
            difference = (unit_length(a) - unit_length(b)).square()
            weights = getattr(self, f"lin{stage}_model_1_weight")
            total = total + F.conv2d(difference, weights).mean((1, 2, 3))
        return total

    def features(self, x: Tensor) -> list[Tensor]:
        """The output of each stage, before the maxima."""
        height, width = x.shape[-2:]
        x = F.pad(x, (0, max(0, MIN_SIDE - width), 0, max(0, MIN_SIDE - height)), mode="replicate")
        x, outputs = (x - self.mean) / self.std, []
        for stage, convolutions in enumerate(STAGES):
            if stage:
                x = F.max_pool2d(x, 2)
            for index, _ in convolutions:
                weight, bias = (getattr(self, f"features_{index}_{kind}") for kind in ("weight", "bias"))
                x = F.relu(F.conv2d(x, weight, bias, padding=1))
            outputs.append(x)
        return outputs


def unit_length(features: Tensor) -> Tensor:
    """Each position divided by its norm over channels; 0 where all features are 0, as the ReLU before has no gradient
    there."""
    return features / (features.square().sum(1, keepdim=True).sqrt() + EPS)


def expected_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that LPIPS needs."""
    shapes: dict[str, tuple[int, ...]] = {}
    channels = 3
    for stage, convolutions in enumerate(STAGES):
        for index, width in convolutions:
            shapes[f"features.{index}.weight"], shapes[f"features.{index}.bias"] = (width, channels, 3, 3), (width,)
            channels = width
        shapes[f"lin{stage}.model.1.weight"] = (1, channels, 1, 1)
    return shapes


def load_lpips(path: str) -> LPIPS:
    """LPIPS with the weights of a file. Raises MegaSoraError if it cannot be read, or lacks a tensor or has it in
    another shape; tensors that are not needed are not read."""
    key = f"reconstruction.lpips_path={path}"
    remedy = "write the file as megasora/codec/vae/lpips.py describes, or set reconstruction.lpips=0"
    if not Path(path).is_file():
        raise MegaSoraError(f"{key} is not a file; {remedy}")
    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            for name, shape in expected_shapes().items():
                if name not in names:
                    raise MegaSoraError(f"{key} has no tensor {name}; {remedy}")
                if (found := file.get_slice(name).get_shape()) != list(shape):
                    raise MegaSoraError(f"{key}: {name} has shape {found}, not {list(shape)}; {remedy}")
            tensors = {name: file.get_tensor(name) for name in expected_shapes()}
    except (SafetensorError, OSError) as error:
        raise MegaSoraError(f"{key} cannot be read: {printable(str(error), 200)}; {remedy}") from None
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise MegaSoraError(f"{key}: {name} has values that are not finite; {remedy}")
    return LPIPS(tensors)
