"""Keys and values that were renamed before 0.1.0, and the error that answers an old one."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

from megasora.config.convert import shown
from megasora.config.schema import every_key, find_section
from megasora.config.yaml_text import Tree, dump_letters, letters
from megasora.errors import printable

RENAMED = {  # old key: new key; a section stands for all of its keys
    "data.weights": "data.mixture_weights",
    "data.lookahead": "data.packing_window",
    "data.drop": "data.token_drop",
    "data.prefetch": "data.prefetch_steps",
    "data.threads": "data.reader_threads",
    "data.timeout": "data.read_timeout_seconds",
    "data.max_bad_fraction": "data.max_damaged_fraction",
    "ingest.memory_mib": "ingest.worker_memory_mib",
    "ingest.seconds": "ingest.decode_timeout_seconds",
    "ingest.fps": "ingest.max_fps",
    "ingest.measure": "ingest.record_quality",
    "model.weights": "run.start",
    "model.init_from": "run.start",
    "model.rope_scale": "model.rope_ntk_factor",
    "model.kernels": "model.kernel_backend",
    "model.attention": "model.attention_backend",
    "objective.timestep_mean": "objective.logit_mean",
    "objective.timestep_std": "objective.logit_std",
    "objective.condition": "objective.frame_conditioning",
    "optim.rate": "optim.lr",
    "optim.warmup": "optim.warmup_steps",
    "optim.final_rate": "optim.min_lr_ratio",
    "optim.clip": "optim.max_grad_norm",
    "optim.ema": "optim.ema_decay",
    "sample.steps": "sample.num_inference_steps",
    "sample.guidance": "sample.guidance_scale",
}
RENAMED_VALUES = {  # new key: {old value: new value}
    "model.qk_norm": {"head": "per_head", "width": "across_heads"},
    "model.attention_backend": {"plain": "math"},
    "model.recompute": {"attention": "keep_attention"},
}

Setting = tuple[str, Tree]  # dotted key, value


def renamed_in_file(values: dict, path: str) -> str | None:
    """A sentence on all old keys and values of a YAML mapping, with the YAML that replaces them; None without any."""
    found = find_renamed([values])
    if not found:
        return None
    tree: dict[str, Any] = {}
    for key, value in replacements(found, [values]):
        *sections, name = key.split(".")
        section = tree
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    hint = f". In these sections, replace the old keys by:\n{dump_letters(tree, flow=False)}" if tree else ""
    return f"{path}: {describe(found, [values])}{hint}"


def renamed_in_overrides(layers: list[dict]) -> str | None:
    """A sentence on all old keys and values of overrides, with the new overrides; None without any."""
    found = find_renamed(layers)
    if not found:
        return None
    words = printable(" ".join(shlex.quote(f"{key}={letters(value)}") for key, value in replacements(found, layers)))
    return describe(found, layers) + (f". The new overrides: {words}" if words else "")


def find_renamed(layers: list[dict]) -> list[tuple[Setting, Setting]]:
    """(old, new) of each setting in nested mappings that was renamed."""
    pairs = [(setting, rename(*setting)) for values in layers for setting in leaves(values)]
    return [(old, new) for old, new in pairs if old != new]


def replacements(found: list[tuple[Setting, Setting]], layers: list[dict]) -> list[Setting]:
    """The new settings, except those whose new key is given too, is a section, or does not exist."""
    valid = {key for key in every_key() if find_section(key) is None}
    present = {key for values in layers for key, _ in leaves(values)}
    return [new for old, new in found if new[0] in valid and (old[0] == new[0] or new[0] not in present)]


def rename(key: str, value: Tree) -> Setting:
    """The current key and value of a setting."""
    old, new = renamed_prefix(key)
    if old != new == "run.start":
        return new, f"init:{letters(value)}"
    key = new + key.removeprefix(old)
    return key, RENAMED_VALUES.get(key, {}).get(value, value) if isinstance(value, str) else value


def renamed_prefix(key: str) -> tuple[str, str]:
    """The entry of RENAMED for a key or for its section, or (key, key)."""
    return next((pair for pair in RENAMED.items() if key == pair[0] or key.startswith(pair[0] + ".")), (key, key))


def leaves(values: dict, prefix: str = "") -> Iterator[Setting]:
    """(dotted key, value) of everything in a nested mapping that is not itself a mapping, or an empty one."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{key}.")
        else:
            yield key, value


def describe(found: list[tuple[Setting, Setting]], layers: list[dict]) -> str:
    """`optim.rate was renamed to optim.lr; ...`; a section is named once, a value only if it was renamed too."""
    present = {key for values in layers for key, _ in leaves(values)}
    sentences = []
    for (old, value), (new, new_value) in found:
        if old != new and new in present:
            sentences.append(f"{old} was renamed to {new}, and both are given; keep {new}")
        elif value == new_value:
            old, new = renamed_prefix(old)
            sentences.append(f"{old} was renamed to {new}")
        else:
            sentences.append(f"{old}={shown(value)} was renamed to {new}={shown(new_value)}")
    return "; ".join(dict.fromkeys(sentences))
