"""codec.safetensors of a frozen codec: written with codec.json in one step, read with every check.

A hash is the SHA-256 over (name, dtype, shape, bytes) of tensors in the order of their names; one for the encoder and
the quantizer, which make the latents, one for the decoder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megasora.codec.vae.folder import MANIFEST, WEIGHTS, CodecManifest, manifest_text
from megasora.codec.vae.network import VideoVAE
from megasora.config import VAEConfig
from megasora.errors import MegaSoraError, first_of, printable
from megasora.files import sync

ENCODER, DECODER = ("encoder.", "quantizer."), ("decoder.",)
MAX_NAMED = 2  # tensors in a message


def save_codec(
    folder: Path,
    vae: VAEConfig,
    factors: list[int],
    channels: int,
    state_dict: Mapping[str, Tensor],
    mean: list[float],
    std: list[float],
    step: int,
    psnr: float | None,
) -> CodecManifest:
    """Writes a codec into `folder`, which it replaces if that holds an older codec; nothing half-written is left.

    `state_dict`: all parameters and buffers of VideoVAE, full. `mean`, `std`: of each latent channel, [channels]; a
    channel that is constant (std 0) is divided by 1. Raises MegaSoraError for numbers that are not finite, and where
    `folder` holds anything else.
    """
    tensors = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in state_dict.items()}
    check_finite(tensors, f"the codec of step {step}: it cannot be saved", "train on from an earlier checkpoint")
    manifest = CodecManifest(
        list(factors), channels, vae, [float(m) for m in mean], [float(s) or 1.0 for s in std],
        tensor_hash(tensors, ENCODER), tensor_hash(tensors, DECODER), step, None if psnr is None else float(psnr),
    )  # fmt: skip
    if folder.exists() and not is_replaceable(folder):
        raise MegaSoraError(f"{folder} exists and holds no codec; remove it, or choose another folder")
    staging, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("part", "old.part"))
    for leftover in (staging, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        save_file(tensors, staging / WEIGHTS)
        (staging / MANIFEST).write_text(manifest_text(manifest), encoding="utf-8")
        for path in (staging / WEIGHTS, staging / MANIFEST, staging):
            sync(path)
        replace_folder(staging, folder, old)
    except SafetensorError as error:
        raise MegaSoraError(f"{folder / WEIGHTS} cannot be written: {printable(str(error), 200)}") from None
    finally:
        for leftover in (staging, old):
            shutil.rmtree(leftover, ignore_errors=True)
    return manifest


def replace_folder(new: Path, folder: Path, old: Path) -> None:
    """Renames `new` to `folder`, and what was there to `old`; if that fails, `folder` is as it was."""
    if folder.exists():
        os.replace(folder, old)
    try:
        os.replace(new, folder)
    except OSError:
        if old.exists():
            os.replace(old, folder)
        raise
    sync(folder.parent)


def is_replaceable(folder: Path) -> bool:
    """Whether a folder is empty or holds a codec and nothing else."""
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= {MANIFEST, WEIGHTS}


def load_network(folder: Path, manifest: CodecManifest) -> VideoVAE:
    """The network of a codec folder on the CPU, for inference. Raises MegaSoraError if the weights are not its own."""
    path = folder / WEIGHTS
    with torch.device("meta"):
        network = VideoVAE(manifest.vae, manifest.factors, manifest.channels)
    expected = {name: tensor.shape for name, tensor in network.state_dict().items()}
    tensors = read_tensors(path, expected)
    for key, prefixes in (("encoder_sha256", ENCODER), ("decoder_sha256", DECODER)):
        actual, stored = tensor_hash(tensors, prefixes), getattr(manifest, key)
        if actual != stored:
            raise MegaSoraError(
                f"{path} is damaged or of another codec: its {key} is {actual[:16]}, {folder / MANIFEST} says "
                f"{stored[:16]}; restore both files of one codec, or make it again with: megasora codec export RUN"
            )
    check_finite(tensors, f"{path} cannot be used", "the training that wrote it has diverged; export an earlier one")
    dtypes = {name: tensor.dtype for name, tensor in network.state_dict().items()}
    network.load_state_dict({name: tensor.to(dtypes[name]) for name, tensor in tensors.items()}, assign=True)
    return network.eval().requires_grad_(False)


def read_tensors(path: Path, expected: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """All tensors of a file, fp32. Raises MegaSoraError unless it has these names and shapes."""
    remedy = f"restore both files of one codec ({MANIFEST} and {WEIGHTS}), or make it again: megasora codec export RUN"
    if not path.is_file():
        raise MegaSoraError(f"{path.parent} has no weights, {WEIGHTS}; {remedy}")
    try:
        with safe_open(path, "pt") as file:
            found = {name: (file.get_slice(name).get_dtype(), file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
            if missing or extra:
                lists = [
                    f"{len(names)} {what} ({first_of([printable(n, 60) for n in names], MAX_NAMED)})"
                    for names, what in ((missing, "are missing"), (extra, "are unknown"))
                    if names
                ]
                raise MegaSoraError(f"{path} has other tensors than {MANIFEST} describes: {', '.join(lists)}; {remedy}")
            for name, shape in expected.items():
                if found[name] != ("F32", list(shape)):
                    kind, other = found[name]
                    raise MegaSoraError(
                        f"{path}: {name} is {kind} {other}, the network of {MANIFEST} has F32 {list(shape)}; {remedy}"
                    )
            return {name: file.get_tensor(name) for name in expected}
    except (SafetensorError, OSError, ValueError) as error:
        raise MegaSoraError(f"{path} cannot be read: {printable(str(error), 200)}; {remedy}") from None


def check_finite(tensors: Mapping[str, Tensor], what: str, remedy: str) -> None:
    """Raises MegaSoraError for a tensor with NaN or infinite values."""
    for name, tensor in tensors.items():
        if count := int((~torch.isfinite(tensor)).sum()):
            raise MegaSoraError(f"{what}: {name} has {count} values that are not finite; {remedy}")


def tensor_hash(tensors: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> str:
    """SHA-256 of those tensors whose names begin with one of `prefixes`, as hex. They are fp32, on the CPU."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        if name.startswith(prefixes):
            value = tensors[name]
            digest.update(json.dumps([name, "F32", list(value.shape)]).encode())
            digest.update(value.numpy().astype("<f4", copy=False).tobytes())
    return digest.hexdigest()
