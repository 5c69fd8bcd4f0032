"""`megasora checkpoint import-wan FOLDER --out FILE | --run RUN`: the weights of a Wan model as MegaSora reads them, or
a run folder for `megasora sample RUN`.

    FOLDER/transformer    -> RUN/checkpoints/step-00000000, see formats/wan.py and checkpoint/imported.py
    FOLDER/vae            -> codec.name=wan, codec.path=FOLDER     in RUN/config.yaml; both are read when sampling
    FOLDER/text_encoder   -> text.path=FOLDER, tokenizer of FOLDER/tokenizer

Samples are then those of WanPipeline of diffusers with Euler steps: guidance moves away from the encoded negative
prompt, by default the empty one, because Wan has no null token. Timesteps are shifted by the flow_shift of
FOLDER/scheduler for a clip of the default size, and as everywhere in MegaSora less for a smaller one.
"""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import torch

from megasora.build import patch_dim
from megasora.checkpoint.imported import save_imported
from megasora.codec import resolve_codec
from megasora.commands.checkpoint_source import num_bytes
from megasora.commands.run_folder import new_run
from megasora.config import Config, FrameConditioningConfig, load, token_pixels
from megasora.errors import MegaSoraError
from megasora.files import check_folder, read_regular_file
from megasora.formats.recognize import what_is
from megasora.formats.wan import import_wan, open_weights
from megasora.formats.wan_folder import WanFolder, read_wan
from megasora.formats.wan_layers import parameter_shapes
from megasora.jsonl import parse_json
from megasora.observe.byte_progress import byte_progress
from megasora.text import build_text_encoder

SIZES = {  # pixels of a latent's side -> the size, frames, fps and flow_shift that the model is made for
    8: ((480, 832), 81, 16, 3.0),  # Wan 2.1
    16: ((704, 1280), 121, 24, 5.0),  # Wan 2.2 TI2V
}
SAMPLE = (  # as in WanPipeline of diffusers
    "sample.solver=euler", "sample.num_inference_steps=50", "sample.guidance_scale=5",
    "sample.unconditional=negative_prompt",
)  # fmt: skip
SCHEDULER, SHIFT_KEYS = "scheduler/scheduler_config.json", ("flow_shift", "shift")
MAX_JSON_BYTES = 1 << 20
OTHERS = ("run", "checkpoint", "megasora", "deepspeed", "dcp")  # formats that are not read here


def import_wan_to_file(place: Path, out: Path) -> None:
    """Writes the weights of a Wan model to `out`, and prints the settings of a run that starts from them."""
    wan = read_model(place)
    shapes = shapes_of(wan, load(None, wan.settings()))
    with byte_progress("import", num_bytes(shapes)) as advance:
        import_wan(wan, shapes, out, advance)
    print(f"weights in {out}; to train them further, append to `megasora train YAML`:")
    print(" \\\n".join(shlex.quote(setting) for setting in (*wan.settings(), f"run.start=init:{out}")))


def read_model(place: Path) -> WanFolder:
    """As `read_wan`. Raises MegaSoraError also for what another command reads."""
    found = what_is(place)
    if found.format in OTHERS:
        raise MegaSoraError(f"{place} is {found.description}, and no model of Wan; {found.remedy}")
    return read_wan(place)


def shapes_of(wan: WanFolder, config: Config) -> dict[str, torch.Size]:
    return parameter_shapes(config.model, patch_dim(config), wan.text_dim)


def import_wan_to_run(place: Path, run: Path, overrides: list[str]) -> None:
    """Writes the run folder `run`, whole or not at all. `overrides`: key=value settings of its config.yaml.

    Raises MegaSoraError if `run` is not empty, or the codec or text encoder is missing or does not fit the weights.
    """
    check_new_folder(run)
    wan = read_model(place)
    config = run_config(place, wan, overrides)
    check_fit(wan, config)
    shapes = shapes_of(wan, config)
    value_of = open_weights(wan, shapes)
    with byte_progress("import", num_bytes(shapes)) as advance:
        run.absolute().parent.mkdir(parents=True, exist_ok=True)
        with new_run(run, config) as store:
            save_imported(store, shapes, value_of, f"Wan, {place}", advance)
    print(f"{run}: sample a video of {config.sample.size} pixels and {config.sample.frames} frames with")
    print(shlex.join(["megasora", "sample", str(run), "--prompt", "a red circle moves right", "--out", "out.mp4"]))


def check_new_folder(run: Path) -> None:
    check_folder(run, f"--run {run}")
    if run.is_dir() and any(run.iterdir()):
        raise MegaSoraError(f"--run {run} is not empty; give a new folder, e.g. runs/wan")


def run_config(place: Path, wan: WanFolder, overrides: list[str]) -> Config:
    """The configuration for config.yaml: of the weights, of the pipeline that they are part of, and `overrides`."""
    own = [*wan.settings(), "codec.name=wan", *pipeline_settings(pipeline_folder(place))]
    config = load(None, [*own, *overrides])
    config.codec = resolve_codec(config.codec)
    config = load(None, [*own, *sample_settings(place, config), *overrides])
    config.codec = resolve_codec(config.codec)
    return config


def pipeline_folder(place: Path) -> Path:
    """The folder of the pipeline whose transformer is `place`: a folder, perhaps transformer/ itself, or a file."""
    folder = place.parent if place.is_file() else place
    return folder if (folder / "transformer").is_dir() else folder.absolute().parent


def pipeline_settings(pipeline: Path) -> list[str]:
    found = {"codec.path": ("vae",), "text.path": ("text_encoder", "tokenizer")}
    return [
        f"{key}={quote(str(pipeline.absolute()))}"
        for key, folders in found.items()
        if all((pipeline / name).is_dir() for name in folders)
    ]


def quote(text: str) -> str:
    """Letters of a setting, whatever they are."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def sample_settings(place: Path, config: Config) -> list[str]:
    """Settings of `sample`, and of `objective` for the shift of its timesteps. `config`: with the codec."""
    (height, width), frames, fps, shift = SIZES.get(config.codec.factors[1], SIZES[8])
    ft, fh, fw = token_pixels(config)
    tokens = (1 + (frames - 1) // ft) * (height // fh) * (width // fw)
    return [
        *SAMPLE, f"sample.size={height}x{width}", f"sample.frames={frames}", f"sample.fps={fps}",
        f"objective.shift={read_shift(pipeline_folder(place)) or shift}", f"objective.shift_tokens={tokens}",
        *frame_conditioning(first=1 if config.codec.factors[1] == 16 else 0),
    ]  # fmt: skip


def frame_conditioning(first: int) -> list[str]:
    """Which clean frames the model was trained with: `first` is 1 for TI2V, which takes a first frame."""
    weights = dict.fromkeys((f.name for f in dataclasses.fields(FrameConditioningConfig)), 0)
    weights |= {"none": 1, "first": first}
    return [f"objective.frame_conditioning.{name}={weight}" for name, weight in weights.items()]


def read_shift(pipeline: Path) -> float | None:
    """The shift of the timesteps in the scheduler's file; None if there is none, or it does not say."""
    try:
        values = parse_json(read_regular_file(pipeline / SCHEDULER, MAX_JSON_BYTES))
    except (OSError, ValueError):
        return None
    numbers = [values.get(key) for key in SHIFT_KEYS] if isinstance(values, dict) else []
    return next((float(x) for x in numbers if isinstance(x, int | float) and 0 < x < 1000), None)


def check_fit(wan: WanFolder, config: Config) -> None:
    """Raises MegaSoraError if the codec or the text encoder is not the one that the weights were trained with."""
    if config.codec.channels != wan.channels:
        raise MegaSoraError(
            f"codec.path={config.codec.path} has {config.codec.channels} latent channels, the transformer "
            f"{wan.channels}; give the autoencoder of the same model: codec.path=FOLDER/vae"
        )
    features = build_text_encoder(config.text).text_dim
    if features != wan.text_dim:
        raise MegaSoraError(
            f"text.path={config.text.path} has {features} features, the transformer reads {wan.text_dim}; give the "
            "text encoder of the same model: text.path=FOLDER of the pipeline"
        )
