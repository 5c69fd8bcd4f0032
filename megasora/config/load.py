"""Reads a configuration: defaults, then a YAML file, then `key.path=value` overrides. Writes it back as YAML."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megasora.config.convert import MAX_SHOWN, convert_values
from megasora.config.renamed import RENAMED, find_renamed, leaves, rename, renamed_in_file, renamed_in_overrides
from megasora.config.schema import Config, every_key, find_section
from megasora.config.validate import validate
from megasora.config.yaml_text import NOT_ACCEPTED, Tree, letters, parse_yaml
from megasora.errors import MegaSoraError, SeveralProblems, printable
from megasora.files import read_regular_file

MAX_YAML_BYTES = 1 << 20
MAX_KEY = 200  # characters
MAX_PROBLEMS = 20  # in one message
NAMES_ELSEWHERE = {  # last part of a key, as other trainers name the setting: our key
    "learning_rate": "optim.lr",
    "warmup": "optim.warmup_steps",
    "num_warmup_steps": "optim.warmup_steps",
    "adam_epsilon": "optim.eps",
    "gradient_clipping": "optim.max_grad_norm",
    "grad_clip": "optim.max_grad_norm",
    "clip_grad": "optim.max_grad_norm",
    "ema": "optim.ema_decay",
    "hidden_size": "model.width",
    "num_layers": "model.depth",
    "num_hidden_layers": "model.depth",
    "num_heads": "model.heads",
    "num_attention_heads": "model.heads",
    "batch_size": "data.packs_per_step",
    "global_batch_size": "data.packs_per_step",
    "num_workers": "data.reader_threads",
    "max_steps": "run.steps",
    "num_steps": "run.steps",
    "output_dir": "run.dir",
    "save_every": "checkpoint.every",
    "save_interval": "checkpoint.every",
    "tensor_parallel_size": "parallel.tensor",
    "context_parallel_size": "parallel.context",
    "pipeline_parallel_size": "parallel.pipeline",
    "guidance": "sample.guidance_scale",
    "cfg_scale": "sample.guidance_scale",
}


def load(path: str | Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The defaults, changed by the YAML file at `path` and then by `key.path=value` overrides; validated.

    Raises MegaSoraError with all renamed keys and their new names, and all unknown keys and the nearest valid ones; or
    with a value and what it must be.
    """
    file_layers = [(printable(str(path)), read_yaml(Path(path)))] if path is not None else []
    override_layers = [(describe_override(text), parse_override(text)) for text in overrides]
    check_keys(file_layers, override_layers)

    tree = OmegaConf.structured(Config)
    for source, values in file_layers:
        try:
            tree = OmegaConf.merge(tree, convert_values(Config, values))
        except MegaSoraError as error:
            raise MegaSoraError(f"{source}: {error}") from None
    for _, values in override_layers:
        tree = OmegaConf.merge(tree, convert_values(Config, values))
    config: Config = OmegaConf.to_object(tree)
    validate(config)
    return config


def load_run_config(run_dir: str | Path) -> Config:
    """The configuration saved in a run folder; raises MegaSoraError if a version with other keys has written it."""
    path = Path(run_dir) / "config.yaml"
    remedy = "restore it, or move it away: a run is then resumed with the settings of its command"
    try:
        values = read_yaml(path)
    except MegaSoraError as error:
        raise MegaSoraError(f"{error}; {remedy}") from None
    if not values:
        raise MegaSoraError(f"{path} is empty; {remedy}")
    foreign = [key for (key, _), _ in find_renamed([values])]
    known = {*every_key(), *foreign}
    foreign += [key for key, _ in leaves(values) if key not in known]
    if foreign:
        names = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise MegaSoraError(
            f"{path} was written by a version of MegaSora with other configuration keys ({names}); "
            "start again in another run.dir"
        )
    return load(path)


def to_yaml(config: Config) -> str:
    """All keys and values as YAML, as saved in the run folder; `load` reads it back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def describe_override(text: str) -> str:
    return f"override '{printable(text, MAX_SHOWN)}'"


def parse_override(text: str) -> dict[str, Tree]:
    """'key.path=value' as a nested mapping. Lists and sections are YAML; other values are letters, `"x"` is x."""
    key, equals, value = text.partition("=")
    source = describe_override(text)
    if not equals or not key or len(key) > MAX_KEY:
        raise MegaSoraError(f"{source} is not of the form key.path=value, e.g. run.steps=100")
    if "[" in key:
        raise MegaSoraError(f"{source}: give a list as a whole, e.g. optim.betas=[0.9,0.99]")
    if is_yaml(key):
        tree = parse_yaml(value, source)
    elif value[:1] in NOT_ACCEPTED:
        raise MegaSoraError(f"{source}: {NOT_ACCEPTED[value[:1]]}; put the value in quotes, {key}='\"{value}\"'")
    else:
        tree = unquote(value, source)
    for name in reversed(key.split(".")):
        tree = {name: tree}
    return tree


def is_yaml(key: str) -> bool:
    """Whether a key, or the one that replaced it, is a section or a list."""
    key, _ = rename(key, "")
    default: Any = Config()
    for name in key.split("."):
        default = getattr(default, name, "")
    return not isinstance(default, str | int | float)


def unquote(value: str, source: str) -> str:
    """The text within quotes, if the value is one in quotes."""
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        with suppress(MegaSoraError):  # quotes that are letters: 'a' and 'b'
            return letters(parse_yaml(value, source))
    return value


def read_yaml(path: Path) -> dict[str, Tree]:
    """The mapping in a YAML file of at most MAX_YAML_BYTES; raises MegaSoraError if the file is anything else."""
    name = printable(str(path))
    try:
        text = read_regular_file(path, MAX_YAML_BYTES).decode("utf-8-sig")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise MegaSoraError(f"no configuration file {name}{hint}") from None
    except UnicodeDecodeError as error:
        raise MegaSoraError(f"{name} is not UTF-8 text: {error}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MegaSoraError(f"{name} cannot be read: {reason}; give a YAML file") from None
    values = parse_yaml(text, name) or {}
    if not isinstance(values, dict):
        kind = "list" if isinstance(values, list) else "text"
        raise MegaSoraError(f"{name} holds a {kind}; a configuration is a mapping of sections")
    return values


def check_keys(files: list[tuple[str, dict[str, Tree]]], overrides: list[tuple[str, dict[str, Tree]]]) -> None:
    """Raises MegaSoraError with all unknown and renamed keys of (source, values) layers, a line per unknown key."""
    problems = []
    for source, values in files + overrides:
        problems += [f"{source}: {problem}" for problem in islice(find_problems(values), MAX_PROBLEMS)]
    renamed = [renamed_in_overrides([values for _, values in overrides])]
    renamed += [renamed_in_file(values, source) for source, values in files]  # last, as it ends with lines of YAML
    problems += [text for text in renamed if text]
    if problems:
        raise SeveralProblems("\n".join(problems))


def find_problems(values: Tree, prefix: str = "") -> Iterator[str]:
    """A sentence on each unknown key, and on each section that is not a mapping; renamed keys count as known."""
    schema = find_section(prefix) if prefix else Config
    known = [f.name for f in dataclasses.fields(schema)]
    if not isinstance(values, dict):
        yield f"{prefix} is a section; give {prefix}.<key>, one of {', '.join(known)}"
        return
    for name, value in values.items():
        old = f"{prefix}.{name}".strip(".")
        key = RENAMED.get(old, old)
        if key == old and name not in known:
            near = nearest_key(key, prefix)
            hint = f"did you mean '{near}'?" if near else f"known keys: {', '.join(known)}"
            if near == key:  # a dotted key in a file
                hint = f"a file has sections, {key.replace('.', ': {')}: ...{'}' * key.count('.')}"
            yield f"unknown key '{printable(key, MAX_KEY)}'; {hint}"
        elif find_section(key):
            yield from find_problems(value, key)


def nearest_key(key: str, prefix: str) -> str | None:
    """The valid key with the same last part as `key`, or that of NAMES_ELSEWHERE, or the most similar one, or None."""
    name = key.rsplit(".", 1)[-1]
    keys = [known for known in every_key() if known != prefix]
    same_name = [known for known in keys if known.rsplit(".", 1)[-1] == name]
    same_name = same_name or [known for known in keys if known == NAMES_ELSEWHERE.get(name)]
    return (same_name or difflib.get_close_matches(key, keys, 1, 0.5) or [None])[0]
