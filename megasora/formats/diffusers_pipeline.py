"""The parts of a Wan pipeline beside its transformer, for an exported folder.

    vae/, text_encoder/, tokenizer/    of the run's codec.path and text.path, if these are folders of this machine:
                                       weights hard-linked, or copied; all other files copied
    scheduler/scheduler_config.json    of the same pipeline, or that of the release, with the run's shift
    model_index.json                   only if all parts are there

Weights of .safetensors and files of settings and words only: no pickles and no code.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from megasora.codec.clip_sizes import latent_frames
from megasora.config import Config, token_pixels
from megasora.config.validate import parse_size
from megasora.diffusion.timesteps import shift_factor
from megasora.files import read_regular_file, sync, write_text_atomic
from megasora.jsonl import parse_json

TRANSFORMER, SCHEDULER, INDEX = "transformer", "scheduler/scheduler_config.json", "model_index.json"
DIFFUSERS_VERSION = "0.35.0"  # the first one that reads all keys that are written here
MAX_JSON_BYTES = 1 << 20
CLASS_NAME = re.compile(r"[A-Za-z]\w{0,99}", re.ASCII)
WEIGHTS = ".safetensors"
MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index*.json")
TOKENIZER_FILES = (
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab*.json", "*.model", "*.txt", "*.jinja",
)  # fmt: skip
PARTS = {  # files, and the library and class that read them
    "vae": (MODEL_FILES, ["diffusers", "AutoencoderKLWan"]),
    "text_encoder": (MODEL_FILES, ["transformers", "UMT5EncoderModel"]),
    "tokenizer": (TOKENIZER_FILES, ["transformers", "T5TokenizerFast"]),
}
UNIPC = {  # as released with Wan
    "_class_name": "UniPCMultistepScheduler", "_diffusers_version": DIFFUSERS_VERSION, "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.0,
}  # fmt: skip
SHIFT_KEYS = ("flow_shift", "shift")
IMAGE_PROMPTS = ("first", "head", "both")  # of objective.frame_conditioning: clips that begin with clean frames


def write_pipeline(config: Config, out: Path, how: str) -> str:
    """Adds to the folder `out` what a pipeline has beside its transformer. `how`: link | copy.

    Returns what is missing, in words, or "".
    """
    sources = find_parts(config)
    pipeline = sources["vae"].parent if "vae" in sources else None
    (out / SCHEDULER).parent.mkdir()
    write_json(out / SCHEDULER, scheduler_config(config, pipeline))
    for part, folder in sources.items():
        copy_files(folder, out / part, PARTS[part][0], how == "link")
    if missing := [part for part in PARTS if part not in sources]:
        return (
            f"without {', '.join(missing)}, as codec.path={config.codec.path or '(none)'} and "
            f"text.path={config.text.path} are no folders of a Wan pipeline"
        )
    write_json(out / INDEX, model_index(config, pipeline))
    return ""


def find_parts(config: Config) -> dict[str, Path]:
    """The folders of those parts that are on this machine and have their files."""
    codec, text = Path(config.codec.path), Path(config.text.path)
    folders = {}
    if config.codec.name == "wan":
        folders["vae"] = codec / "vae" if (codec / "vae").is_dir() else codec
    if config.text.name == "t5":
        is_pipeline = (text / "text_encoder").is_dir() and (text / "tokenizer").is_dir()
        folders["text_encoder"] = text / "text_encoder" if is_pipeline else text
        folders["tokenizer"] = text / "tokenizer" if is_pipeline else text
    return {part: folder for part, folder in folders.items() if is_complete(folder, part)}


def is_complete(folder: Path, part: str) -> bool:
    """Whether the folder has the weights and the settings of a model, or the words of a tokenizer."""
    names = [path.name for path in part_files(folder, PARTS[part][0])]
    if part == "tokenizer":
        return "tokenizer_config.json" in names
    return "config.json" in names and any(name.endswith(WEIGHTS) for name in names)


def part_files(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    if not folder.is_dir():
        return []
    paths = (path for path in sorted(folder.iterdir()) if any(fnmatch(path.name, pattern) for pattern in patterns))
    return [path for path in paths if path.is_file()]


def copy_files(folder: Path, out: Path, patterns: tuple[str, ...], link: bool) -> None:
    """Hard links, if `link`, of weights, where the file system has them; copies of all else. Links are followed."""
    out.mkdir()
    for path in part_files(folder, patterns):
        target = out / path.name
        if not (link and path.suffix == WEIGHTS and linked(path, target)):
            shutil.copyfile(path, target)
            sync(target)


def linked(path: Path, target: Path) -> bool:
    try:
        os.link(os.path.realpath(path), target)
    except OSError:  # another file system, or one without links
        return False
    return True


def scheduler_config(config: Config, pipeline: Path | None) -> dict[str, Any]:
    """That of the pipeline, or of the release, with the run's shift of the timesteps for a clip of the default size."""
    values = read_object(pipeline / SCHEDULER) if pipeline else {}
    if not is_class_name(values.get("_class_name")):
        values = UNIPC
    shift = float(shift_factor(torch.tensor(sample_tokens(config)), config.objective))
    return values | {key: shift for key in SHIFT_KEYS if key in values}


def sample_tokens(config: Config) -> int:
    """Tokens of a clip of the size that the run samples by default; data.patch[0] is 1."""
    height, width = parse_size(config.sample.size, "sample.size")
    _, rows, columns = token_pixels(config)
    frames = latent_frames(config.sample.frames, config.codec.factors[0])
    return frames * -(-height // rows) * -(-width // columns)


def model_index(config: Config, pipeline: Path | None) -> dict[str, Any]:
    """model_index.json; classes of the text encoder and the tokenizer are those of the pipeline, if it says them."""
    known, conditioning = read_object(pipeline / INDEX) if pipeline else {}, config.objective.frame_conditioning
    parts = {part: entry for part, (_, entry) in PARTS.items()}
    for part in ("text_encoder", "tokenizer"):
        entry = known.get(part)
        if isinstance(entry, list) and len(entry) == 2 and entry[0] == "transformers" and is_class_name(entry[1]):
            parts[part] = entry
    return {
        "_class_name": "WanPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "boundary_ratio": None,
        "expand_timesteps": any(getattr(conditioning, key) > 0 for key in IMAGE_PROMPTS),
        "scheduler": ["diffusers", scheduler_config(config, pipeline)["_class_name"]],
        **parts,
        TRANSFORMER: ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
    }


def is_class_name(value: object) -> bool:
    return isinstance(value, str) and CLASS_NAME.fullmatch(value) is not None


def read_object(path: Path) -> dict[str, Any]:
    """The object in a file of JSON; {} if there is none."""
    try:
        values = parse_json(read_regular_file(path, MAX_JSON_BYTES))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def write_json(path: Path, values: dict[str, Any]) -> None:
    write_text_atomic(path, json.dumps(values, indent=2) + "\n")
