"""Reads a configuration: defaults, then a YAML file, then `key.path=value` overrides. Writes it back as YAML."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any

from megasora.config.renamed import check_renamed_in_file, check_renamed_in_overrides
from megasora.config.schema import Config, every_key, section_type
from megasora.config.validate import validate
from megasora.errors import MegaSoraError

MAX_YAML_BYTES = 1 << 20


def load(path: str | Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The defaults, changed by the YAML file at `path` and then by `key.path=value` overrides; validated.

    Raises MegaSoraError with the key and the nearest valid one, or with the value and what it must be. A renamed key
    is answered with its new name.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    layers: list[tuple[str, dict]] = []
    if path is not None:
        layers.append((str(path), read_yaml(Path(path))))
        check_renamed_in_file(layers[0][1], str(path))
    parsed = [parse_override(text) for text in overrides]
    check_renamed_in_overrides(parsed)
    layers += [(f"override '{text}'", values) for text, values in zip(overrides, parsed, strict=True)]

    tree = OmegaConf.structured(Config)
    for source, values in layers:
        check_keys(values, Config, source)
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
    except (yaml.YAMLError, OmegaConfBaseException) as error:  # a duplicate key, a tag of a Python object
        raise MegaSoraError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise MegaSoraError(f"{path} holds a {type(values).__name__}; a configuration is a mapping of sections")
    return values


def check_yaml(text: str, source: str) -> None:
    """Raises MegaSoraError if `text` is not YAML or has aliases, a few bytes of which expand to gigabytes."""
    import yaml

    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise MegaSoraError(f"{source}: YAML aliases (*name) are not accepted; write the value out")
        yaml.compose(text)
    except yaml.YAMLError as error:
        raise MegaSoraError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None


def check_keys(values: Any, schema: type, source: str, prefix: str = "") -> None:
    """Raises MegaSoraError if `values` is not a mapping or has a key that `schema` does not have."""
    known = [f.name for f in dataclasses.fields(schema)]
    if not isinstance(values, dict):
        raise MegaSoraError(
            f"{source}: {prefix or 'the file'} is a section; give {prefix}.<key>, one of {', '.join(known)}"
        )
    for name, value in values.items():
        key = f"{prefix}.{name}".strip(".")
        if name not in known:
            near = nearest_key(key, prefix)
            hint = f"; did you mean '{near}'?" if near else f"; known keys: {', '.join(known)}"
            raise MegaSoraError(f"{source}: unknown key '{key}'{hint}")
        section = section_type(schema, name)
        if section is not None:
            check_keys(value, section, source, key)


def nearest_key(key: str, prefix: str) -> str | None:
    """The valid key with the same last part as `key`, or the most similar one, or None."""
    keys = [known for known in every_key() if known != prefix]
    same_name = [known for known in keys if known.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    return (same_name or difflib.get_close_matches(key, keys, 1, 0.5) or [None])[0]
