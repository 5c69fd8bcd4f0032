"""Finds an autoencoder that diffusers saved: its config.json and its weight files; without torch and diffusers.

    codec.path   FOLDER of the autoencoder   config.json, diffusion_pytorch_model.safetensors, or several and an index
                 FOLDER of a pipeline        the same in FOLDER/vae
                 name on the hub             of either kind; only these files are downloaded

The files may have a variant, e.g. diffusion_pytorch_model.fp16.safetensors. Pickles are never read.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megasora.codec.pretrained_table import FAMILIES, Factors, Family, name_of_class
from megasora.config import CodecConfig
from megasora.errors import MegaSoraError, first_of, printable
from megasora.files import open_regular, read_regular_file
from megasora.jsonl import parse_json

CONFIG, SUBFOLDER = "config.json", "vae"
WEIGHTS = re.compile(r"diffusion_pytorch_model(\.\w+)?(-\d{5}-of-\d{5})?\.safetensors", re.ASCII)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
MAX_JSON_BYTES = 16 << 20
MAX_SHOWN = 60  # characters of a wrong value in a message


@dataclass(frozen=True)
class PretrainedFolder:
    """The autoencoder of `codec.name` and `codec.path`, before it is loaded."""

    folder: Path  # with config.json
    family: Family
    values: dict[str, Any]  # of config.json
    factors: Factors
    channels: int


def read_folder(config: CodecConfig) -> PretrainedFolder:
    """Reads config.json; downloads it from the hub if need be.

    Raises MegaSoraError if `codec.path` is no such folder or name, or the config.json is of another class.
    """
    place, family = find_place(config, [CONFIG, f"{SUBFOLDER}/{CONFIG}"]), FAMILIES[config.name]
    folder = place / SUBFOLDER if (place / SUBFOLDER).is_dir() else place
    values = read_config(config, folder)
    check_class(config, folder, values, family)
    try:
        factors, channels = family.shape(values)
    except (TypeError, ValueError, OverflowError, KeyError) as error:
        raise MegaSoraError(
            f"{folder / CONFIG} does not describe a {family.class_name} of codec.name={config.name} "
            f"({printable(str(error), MAX_SHOWN)}); download it again"
        ) from None
    return PretrainedFolder(folder, family, values, factors, channels)


def pretrained_shape(config: CodecConfig) -> tuple[list[int], int]:
    """(factors, channels) of the autoencoder at `codec.path`, from its config.json, without torch and diffusers.

    Raises MegaSoraError as `read_folder` does.
    """
    found = read_folder(config)
    return list(found.factors), found.channels


def find_place(config: CodecConfig, patterns: list[str]) -> Path:
    """The folder `codec.path`, or the local copy of the files of that hub repository that match `patterns`."""
    path = Path(config.path)
    if path.is_dir():
        return path
    what = "the folder of an autoencoder that diffusers saved, or of a pipeline, which has it in vae/"
    if path.exists():
        raise MegaSoraError(f"codec.path={config.path} is a file; give {what}")
    if not HUB_NAME.fullmatch(config.path):
        raise MegaSoraError(f"codec.path={config.path}: there is no such folder; give {what}, or a hub name like a/b")
    try:
        import huggingface_hub

        return Path(huggingface_hub.snapshot_download(config.path, allow_patterns=patterns))
    except Exception as error:  # no library, no network, no such repository, no permission
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MegaSoraError(
            f"codec.path={config.path} is no folder here, and cannot be read from the hub ({type(error).__name__}: "
            f"{printable(reason, 200)}); give {what}, or a hub name that this machine can reach or has downloaded"
        ) from None


def read_config(config: CodecConfig, folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        values = parse_json(read_regular_file(path, MAX_JSON_BYTES))
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}, not an object")
    except FileNotFoundError:
        raise MegaSoraError(f"codec.path={config.path} {describe_other(Path(config.path), config.name)}") from None
    except (OSError, ValueError) as error:
        raise MegaSoraError(f"{path} cannot be read ({error}); download it again") from None
    return values


def describe_other(path: Path, name: str) -> str:
    """What a folder without config.json is, and the remedy."""
    remedy = f"for codec.name={name} give the folder of a {FAMILIES[name].class_name} that diffusers saved"
    if (path / "codec.json").exists() or (path / "codec" / "codec.json").exists():
        return f"is a codec of megasora.train_codec; set codec.name=vae, or {remedy}"
    if (path / "manifest.json").exists() or (path / "config.yaml").exists():
        return f"is a run or a checkpoint of MegaSora, not an autoencoder; {remedy}"
    return f"has no {CONFIG}; {remedy}"


def check_class(config: CodecConfig, folder: Path, values: dict[str, Any], family: Family) -> None:
    found = values.get("_class_name")
    if found == family.class_name:
        return
    other = name_of_class(found)
    remedy = f"set codec.name={other}" if other else f"give the folder {SUBFOLDER}/ of the pipeline"
    raise MegaSoraError(
        f"{folder / CONFIG} describes a {printable(str(found), MAX_SHOWN)}; codec.name={config.name} reads "
        f"{family.class_name}: {remedy}"
    )


def find_weights(config: CodecConfig, folder: Path) -> tuple[list[Path], str | None]:
    """(the weight files, their variant or None); downloads them if `codec.path` is a hub name.

    Raises MegaSoraError if there are none, a part is missing, or there are several variants and none without.
    """
    if not Path(config.path).is_dir():
        below = f"{SUBFOLDER}/" if folder.name == SUBFOLDER else ""
        find_place(config, [f"{below}{CONFIG}", f"{below}diffusion_pytorch_model*.safetensors*"])
    names = sorted(path.name for path in folder.iterdir())
    variants = {WEIGHTS.fullmatch(name)[1] for name in names if WEIGHTS.fullmatch(name)}
    if not variants:
        if any(next(folder.glob(pattern), None) for pattern in PICKLES):
            raise MegaSoraError(
                f"{folder} holds its weights as a pickle only, which is not read because it can run any code; save "
                "them with save_pretrained(..., safe_serialization=True)"
            )
        raise MegaSoraError(f"{folder} lacks diffusion_pytorch_model.safetensors; download the whole folder")
    if None not in variants and len(variants) > 1:
        given = first_of(sorted(v.removeprefix(".") for v in variants), 6)
        raise MegaSoraError(f"{folder} holds the weights in several variants, {given}, and none without; keep one")
    variant = None if None in variants else variants.pop()
    files = [folder / name for name in names if (m := WEIGHTS.fullmatch(name)) and m[1] == variant]
    check_parts(folder, files, variant)
    return files, variant.removeprefix(".") if variant else None


def check_parts(folder: Path, files: list[Path], variant: str | None) -> None:
    """Raises MegaSoraError if a file that the index names is missing."""
    name = f"diffusion_pytorch_model.safetensors.index{variant or ''}.json"
    if not (folder / name).is_file():
        if len(files) > 1 or "-of-" in files[0].name:
            raise MegaSoraError(f"{folder} lacks {name}; download the whole folder")
        return
    try:
        named = set(parse_json(read_regular_file(folder / name, MAX_JSON_BYTES))["weight_map"].values())
        missing = sorted(named - {file.name for file in files})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise MegaSoraError(f"{folder / name} cannot be read ({error}); download it again") from None
    if missing:
        raise MegaSoraError(f"{folder} lacks {printable(first_of(missing, 6), 200)}; download the whole folder")


def hash_files(found: PretrainedFolder, files: list[Path]) -> str:
    """Hex digits of a hash of the class, config.json and every byte of the weight files: what decides the latents."""
    values = {key: value for key, value in found.values.items() if not key.startswith("_") or key == "_class_name"}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for path in files:
        with open_regular(path) as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
