"""Reads a configuration: defaults, then a YAML file, then `key.path=value` overrides. Writes it back as YAML."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megasora.config.renamed import RENAMED, find_renamed, leaves, renamed_in_file, renamed_in_overrides
from megasora.config.schema import Config, every_key, find_section
from megasora.config.validate import validate
from megasora.errors import MegaSoraError

MAX_YAML_BYTES = 1 << 20
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
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    file_layers = [(str(path), read_yaml(Path(path)))] if path is not None else []
    override_layers = [(f"override '{text}'", parse_override(text)) for text in overrides]
    check_keys(file_layers, override_layers)

    tree = OmegaConf.structured(Config)
    for source, values in file_layers + override_layers:
        try:
            tree = OmegaConf.merge(tree, values)
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise MegaSoraError(f"{source}: {getattr(error, 'full_key', None) or ''}: {reason}") from None
        except TypeError:  # key[0]=value on a list
            raise MegaSoraError(f"{source}: give a list as a whole, e.g. optim.betas=[0.9,0.99]") from None
    try:
        config: Config = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:  # an interpolation ${name} of an unknown name
        raise MegaSoraError(f"{getattr(error, 'full_key', None) or ''}: {str(error).splitlines()[0]}") from None
    validate(config)
    return config


def load_run_config(run_dir: str | Path) -> Config:
    """The configuration saved in a run folder; raises MegaSoraError if a version with other keys has written it."""
    path = Path(run_dir) / "config.yaml"
    values = read_yaml(path)
    foreign = [key for (key, _), _ in find_renamed([values])]
    foreign += [key for key, _ in leaves(values) if key not in {*every_key(), *foreign}]
    if foreign:
        names = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise MegaSoraError(
            f"{path} was written by a version of MegaSora with other configuration keys ({names}); "
            "start again in another run.dir"
        )
    return load(path)


def to_yaml(config: Config) -> str:
    """All keys and values as YAML, as saved in the run folder; `load` reads it back."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))


def parse_override(text: str) -> dict:
    """'key.path=value' as a nested mapping."""
    from omegaconf import OmegaConf

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise MegaSoraError(f"override '{text}' is not of the form key.path=value, e.g. run.steps=100")
    check_yaml(value, f"override '{text}'")
    return OmegaConf.to_container(OmegaConf.from_dotlist([text]))


def read_yaml(path: Path) -> dict:
    """The mapping in a YAML file of at most MAX_YAML_BYTES; raises MegaSoraError if the file is anything else."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise MegaSoraError(f"no configuration file {path}{hint}")
    if path.stat().st_size > MAX_YAML_BYTES:
        raise MegaSoraError(f"{path} has {path.stat().st_size} bytes; a configuration has at most {MAX_YAML_BYTES}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise MegaSoraError(f"{path} is not UTF-8 text: {error}") from None
    check_yaml(text, str(path))
    try:
        values = OmegaConf.to_container(OmegaConf.create(text)) if text.strip() else {}
    except (yaml.YAMLError, OmegaConfBaseException) as error:  # a tag of a Python object
        raise MegaSoraError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise MegaSoraError(f"{path} holds a {type(values).__name__}; a configuration is a mapping of sections")
    return values


def check_yaml(text: str, source: str) -> None:
    """Raises MegaSoraError if `text` is not YAML or has duplicate keys, or aliases, which may expand to gigabytes."""
    import yaml

    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise MegaSoraError(f"{source}: YAML aliases (*name) are not accepted; write the value out")
        root = yaml.compose(text)
    except yaml.YAMLError as error:
        raise MegaSoraError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None
    for key, lines in duplicate_keys(root):
        raise MegaSoraError(f"{source}: {key} occurs twice, lines {lines[0]} and {lines[1]}")


def duplicate_keys(node: Any, prefix: str = "") -> Iterator[tuple[str, tuple[int, int]]]:
    """(dotted key, its first line and the later one) of each key that occurs again in its mapping of a YAML node."""
    import yaml

    if not isinstance(node, yaml.MappingNode):
        return
    first_lines: dict[str, int] = {}
    for name, value in node.value:
        key, line = f"{prefix}{name.value}", name.start_mark.line + 1
        if key in first_lines:
            yield key, (first_lines[key], line)
        first_lines.setdefault(key, line)
        yield from duplicate_keys(value, f"{key}.")


def check_keys(files: list[tuple[str, dict]], overrides: list[tuple[str, dict]]) -> None:
    """Raises MegaSoraError with all unknown and renamed keys of (source, values) layers, a line per unknown key."""
    problems = []
    for source, values in files + overrides:
        problems += [f"{source}: {problem}" for problem in find_problems(values)]
    renamed = [renamed_in_overrides([values for _, values in overrides])]
    renamed += [renamed_in_file(values, source) for source, values in files]  # last, as it ends with lines of YAML
    problems += [text for text in renamed if text]
    if problems:
        raise MegaSoraError("\n".join(problems))


def find_problems(values: Any, prefix: str = "") -> Iterator[str]:
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
            yield f"unknown key '{key}'; {hint}"
        elif find_section(key):
            yield from find_problems(value, key)


def nearest_key(key: str, prefix: str) -> str | None:
    """The valid key with the same last part as `key`, or that of NAMES_ELSEWHERE, or the most similar one, or None."""
    name = key.rsplit(".", 1)[-1]
    keys = [known for known in every_key() if known != prefix]
    same_name = [known for known in keys if known.rsplit(".", 1)[-1] == name]
    same_name = same_name or [known for known in keys if known == NAMES_ELSEWHERE.get(name)]
    return (same_name or difflib.get_close_matches(key, keys, 1, 0.5) or [None])[0]
