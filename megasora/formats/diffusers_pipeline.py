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
from megasora.text.pretrained import pipeline_folders

TRANSFORMER, SCHEDULER, INDEX = "transformer", "scheduler/scheduler_config.json", "model_index.json"
DIFFUSERS_VERSION = "0.35.0"  # the first one that reads all keys that are written here
MAX_JSON_BYTES, MAX_INDEX_BYTES = 1 << 20, 64 << 20
PART_FILE = re.compile(r"[\w.]+-\d{5}-of-\d{5}\.safetensors", re.ASCII)
CLASS_NAME = re.compile(r"[A-Za-z]\w{0,99}", re.ASCII)
TOKENIZER_FILES = (
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab*.json", "*.model", "*.txt", "*.jinja",
)  # fmt: skip
WEIGHTS = {"vae": "diffusion_pytorch_model.safetensors", "text_encoder": "model.safetensors"}
CLASSES = {  # of each part, and the library that has it
    "vae": ["diffusers", "AutoencoderKLWan"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
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
    pipeline = sources["vae"][0].parent.parent if "vae" in sources else None
    (out / SCHEDULER).parent.mkdir()
    write_json(out / SCHEDULER, scheduler_config(config, pipeline))
    for part, files in sources.items():
        copy_files(files, out / part, how == "link")
    if missing := [part for part in CLASSES if part not in sources]:
        return (
            f"without {', '.join(missing)}, as codec.path={config.codec.path or '(none)'} and "
            f"text.path={config.text.path} are no folders of a Wan pipeline"
        )
    write_json(out / INDEX, model_index(config, pipeline))
    return ""


def find_parts(config: Config) -> dict[str, list[Path]]:
    """The files of those parts that are on this machine, whole."""
    codec, text = Path(config.codec.path), Path(config.text.path)
    folders = {}
    if config.codec.name == "wan":
        folders["vae"] = codec / "vae" if (codec / "vae").is_dir() else codec
    if config.text.name == "t5":
        folders["text_encoder"], folders["tokenizer"] = pipeline_folders(text)
    found = {part: tokenizer_files(f) if part == "tokenizer" else model_files(f, part) for part, f in folders.items()}
    return {part: files for part, files in found.items() if files}


def model_files(folder: Path, part: str) -> list[Path]:
    """config.json and the weights without a variant; [] if one of them is missing."""
    weights, index = WEIGHTS[part], f"{WEIGHTS[part]}.index.json"
    names = ["config.json", weights]
    if not (folder / weights).is_file():
        weight_map = read_object(folder / index, MAX_INDEX_BYTES).get("weight_map")
        parts = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not parts or not all(isinstance(name, str) and PART_FILE.fullmatch(name) for name in parts):
            return []
        names = ["config.json", index, *sorted(set(parts))]
    files = [folder / name for name in names]
    return files if all(path.is_file() for path in files) else []


def tokenizer_files(folder: Path) -> list[Path]:
    """[] if there is no tokenizer_config.json."""
    if not (folder / "tokenizer_config.json").is_file():
        return []
    paths = (path for path in sorted(folder.iterdir()) if any(fnmatch(path.name, name) for name in TOKENIZER_FILES))
    return [path for path in paths if path.is_file()]


def copy_files(files: list[Path], out: Path, link: bool) -> None:
    """Hard links, if `link`, of weights, where the file system has them; copies of all else. Links are followed."""
    out.mkdir()
    for path in files:
        target = out / path.name
        if not (link and path.suffix == ".safetensors" and linked(path, target)):
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
    parts = dict(CLASSES)
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


def read_object(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a file of JSON; {} if there is none."""
    try:
        values = parse_json(read_regular_file(path, limit))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def write_json(path: Path, values: dict[str, Any]) -> None:
    write_text_atomic(path, json.dumps(values, indent=2) + "\n")
