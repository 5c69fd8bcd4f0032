"""report_environment.py OUT.json: prints and writes versions and devices, and which packages can be imported."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import platform
import sys
from pathlib import Path

import torch

from benchmarks.record import environment

PACKAGES = (
    "triton", "numpy", "deepspeed", "yaml", "webdataset", "av", "zlib_ng", "safetensors", "rich", "matplotlib",
    "pydantic", "flash_attn", "flash_attn_interface", "flash_attn.cute", "cudnn",
)  # fmt: skip
DISTRIBUTIONS = ("triton", "deepspeed", "flash-attn", "flash-attn-4", "nvidia-cutlass-dsl", "torchao")

record = environment()
print("python", platform.python_version(), "torch", torch.__version__, "cuda", torch.version.cuda)
if torch.cuda.is_available():
    gpu = torch.cuda.get_device_properties(0)
    print(f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB, {gpu.multi_processor_count} multiprocessors")
    record |= {"gpu": gpu.name, "gpus": torch.cuda.device_count(), "multiprocessors": gpu.multi_processor_count}
    record |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    print("cuDNN", torch.backends.cudnn.version(), "NCCL", torch.cuda.nccl.version())
for name in PACKAGES:
    try:
        print(f"{name:22} {getattr(importlib.import_module(name), '__version__', 'found')}")
    except Exception as error:  # a package for another CUDA fails with anything
        print(f"{name:22} missing: {type(error).__name__}: {str(error)[:90]}")
installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
record["packages"] = {name: installed[name] for name in DISTRIBUTIONS if name in installed}
Path(sys.argv[1]).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
