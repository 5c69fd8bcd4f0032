"""Prints versions and devices, and which packages can be imported."""

from __future__ import annotations

import importlib
import platform

import torch

PACKAGES = (
    "triton", "numpy", "deepspeed", "yaml", "webdataset", "av", "zlib_ng", "safetensors", "rich", "matplotlib",
    "pydantic", "flash_attn", "flash_attn_interface", "flash_attn.cute", "cudnn",
)  # fmt: skip

print("python", platform.python_version(), "torch", torch.__version__, "cuda", torch.version.cuda)
if torch.cuda.is_available():
    gpu = torch.cuda.get_device_properties(0)
    print(f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB, {gpu.multi_processor_count} multiprocessors")
    print("cuDNN", torch.backends.cudnn.version(), "NCCL", torch.cuda.nccl.version())
for name in PACKAGES:
    try:
        print(f"{name:22} {getattr(importlib.import_module(name), '__version__', 'found')}")
    except Exception as error:  # a package for another CUDA fails with anything
        print(f"{name:22} missing: {type(error).__name__}: {str(error)[:90]}")
try:
    from torch.nn.attention import list_flash_attention_impls
except ImportError:
    pass
else:
    print("flash attention implementations that torch can activate:", list_flash_attention_impls())
