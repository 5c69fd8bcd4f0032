"""codec.json of a frozen codec on disk: what it is, without its weights and without torch. weights.py has the tensors.

    FOLDER/codec.json          format, factors, channels, settings of the network, mean and std of the latents, hashes
    FOLDER/codec.safetensors   all parameters and buffers of VideoVAE by name, fp32

RUN/codec/ of a finished run of megasora.train_codec is such a folder; RUN may be given in its place.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megasora.codec.fingerprint import tile_suffix
from megasora.config import CodecConfig, Config, VAEConfig
from megasora.config.validate import check_bounds, validate_vae
from megasora.errors import MegaSoraError, printable
from megasora.files import read_regular_file
from megasora.jsonl import parse_json

MANIFEST, WEIGHTS, FORMAT = "codec.json", "codec.safetensors", 1
RUN_FOLDER = "codec"  # of a run of megasora.train_codec, below its run folder
MAX_JSON_BYTES = 1 << 20
MIN_FP32, MAX_FP32 = 2.0**-126, 3.4e38  # of mean and std, which the codec holds in fp32
MAX_SHOWN = 80  # characters of a wrong value in a message
SHA256 = re.compile("[0-9a-f]{64}", re.ASCII)
NOT_OF_THE_ENCODER = ("decoder_width", "codebook_decay", "dead_code_usage")  # settings that change no latent


@dataclass(frozen=True)
class CodecManifest:
    """codec.json. `mean`, `std`: of each latent channel before normalisation, [channels]."""

    factors: list[int]
    channels: int
    vae: VAEConfig
    mean: list[float]
    std: list[float]
    encoder_sha256: str  # of the tensors encoder.* and quantizer.*
    decoder_sha256: str
    step: int  # optimizer steps
    psnr: float | None  # of the last validation, dB
    name: str = "vae"
    format: int = FORMAT

    @property
    def encoder_fingerprint(self) -> str:
        """The same for two codecs whose encoders give the same latents; the decoders may differ."""
        settings = {k: v for k, v in dataclasses.asdict(self.vae).items() if k not in NOT_OF_THE_ENCODER}
        values = [self.encoder_sha256, self.factors, self.channels, settings, self.mean, self.std]
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
        return f"vae-{'x'.join(map(str, self.factors))}-{self.channels}-{digest[:16]}"


def vae_fingerprint(manifest: CodecManifest, config: CodecConfig) -> str:
    """Same fingerprint, same latents: the encoder's, and how frames larger than a tile are divided into tiles."""
    return manifest.encoder_fingerprint + tile_suffix(config)


def find_codec_folder(path: Path) -> Path:
    """The folder with codec.json: `path`, or its folder codec/ if `path` is a run folder.

    Raises MegaSoraError with what `path` is, and what to give.
    """
    for folder in (path, path / RUN_FOLDER):
        if (folder / MANIFEST).exists():
            return folder
    raise MegaSoraError(f"codec.path={printable(str(path))} {describe_path(path)}")


def describe_path(path: Path) -> str:
    """What a path without codec.json is, and the remedy."""
    remedy = "give the run folder of megasora.train_codec, or its folder codec/"
    run = path.parent.parent if path.parent.name == "checkpoints" else path
    if path.is_file():
        is_part = path.name in (MANIFEST, WEIGHTS)
        return f"is a file of a codec; give its folder {path.parent}" if is_part else f"is a file; {remedy}"
    if not path.is_dir():
        return f"does not exist; {remedy}; for a pretrained codec set its codec.name, e.g. wan"
    if run != path and (run / RUN_FOLDER / MANIFEST).exists():
        return f"is a checkpoint of a codec run; give the run, {run}"
    if (run / "config.yaml").exists() and task_of(run) == "codec":
        return (
            f"is a codec run that has not written {RUN_FOLDER}/ yet; train it to its end, or make the codec of its "
            f"newest checkpoint with: megasora codec export {run}"
        )
    if (run / "config.yaml").exists():
        kind = "a run" if run == path else "a checkpoint of a run"
        return f"is {kind} of megasora.train, which trains a DiT, not a codec; {remedy}"
    if (path / WEIGHTS).exists():
        return f"has {WEIGHTS} but no {MANIFEST}; restore it, or {remedy}"
    if any((folder / "config.json").exists() for folder in (path, path / "vae")):
        return f"is no codec of megasora.train_codec; set the codec.name of a pretrained one, e.g. wan, or {remedy}"
    return f"has no {MANIFEST}; {remedy}"


def task_of(run: Path) -> str | None:
    """What a run trains, as its run.json says; None if that cannot be read."""
    try:
        values = parse_json(read_regular_file(run / "run.json", MAX_JSON_BYTES))
    except (OSError, ValueError):
        return None
    return values.get("task") if isinstance(values, dict) else None


def read_manifest(folder: Path) -> CodecManifest:
    """Reads and checks codec.json. Raises MegaSoraError if it is missing, damaged or of another version."""
    path = folder / MANIFEST
    remedy = "restore it, or make the codec again with: megasora codec export RUN"
    try:
        values = parse_json(read_regular_file(path, MAX_JSON_BYTES).decode("utf-8"))
    except FileNotFoundError:
        raise MegaSoraError(f"{folder} has no {MANIFEST}; {remedy}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MegaSoraError(f"{path} cannot be read: {printable(str(reason), MAX_SHOWN)}; {remedy}") from None
    values = values if isinstance(values, dict) else {}
    if values.get("format") != FORMAT or values.get("name") != "vae":
        found = ", ".join(f"{key} {printable(repr(values.get(key)), MAX_SHOWN)}" for key in ("format", "name"))
        raise MegaSoraError(f"{path} has {found}; this version reads format {FORMAT}, name 'vae'; {remedy}")
    try:
        return parse_manifest(values)
    except (ValueError, TypeError, KeyError, MegaSoraError) as error:
        what = f"has no {error}" if isinstance(error, KeyError) else f"is damaged: {printable(str(error), 300)}"
        raise MegaSoraError(f"{path} {what}; {remedy}") from None


def parse_manifest(values: dict[str, Any]) -> CodecManifest:
    """The manifest with these values. Raises ValueError, TypeError, KeyError or MegaSoraError for wrong ones."""
    known = [field.name for field in dataclasses.fields(CodecManifest)]
    if unknown := sorted(values.keys() - set(known)):
        raise ValueError(f"unknown keys {', '.join(unknown[:3])}")
    factors, channels = values["factors"], values["channels"]
    if not isinstance(factors, list) or len(factors) != 3 or any(type(n) is not int for n in [*factors, channels]):
        raise ValueError("factors must be three whole numbers, channels one")
    if not isinstance(values["vae"], dict):
        raise ValueError("vae: not a mapping of settings")
    if unknown := sorted(values["vae"].keys() - {field.name for field in dataclasses.fields(VAEConfig)}):
        raise ValueError(f"unknown keys {', '.join(f'vae.{key}' for key in unknown[:3])}")
    try:
        vae: VAEConfig = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(VAEConfig), values["vae"]))
    except (OmegaConfBaseException, AssertionError) as error:
        raise ValueError(f"vae: {str(error).splitlines()[0]}") from None
    config = Config(codec=CodecConfig(name="vae", factors=factors, channels=channels), vae=vae)
    check_bounds(config)
    validate_vae(config)
    for key in ("mean", "std"):
        numbers = values[key]
        if not isinstance(numbers, list) or len(numbers) != channels or not all(map(is_finite, numbers)):
            raise ValueError(f"{key} must be {channels} finite numbers, one per channel")
    if min(values["std"]) < MIN_FP32:
        channel = min(range(channels), key=values["std"].__getitem__)
        raise ValueError(f"std[{channel}]={values['std'][channel]} must be above 0")
    for key in ("encoder_sha256", "decoder_sha256"):
        if not isinstance(values[key], str) or not SHA256.fullmatch(values[key]):
            raise ValueError(f"{key} is no SHA-256")
    if type(values["step"]) is not int or not (values["psnr"] is None or is_finite(values["psnr"])):
        raise ValueError("step must be a whole number, psnr a number or null")
    return CodecManifest(**{**values, "vae": vae})


def is_finite(value: object) -> bool:
    """Whether it is a number that fp32 can hold."""
    return type(value) in (int, float) and abs(value) <= MAX_FP32


def manifest_text(manifest: CodecManifest) -> str:
    """codec.json as text."""
    return json.dumps(dataclasses.asdict(manifest), indent=1, allow_nan=False) + "\n"
