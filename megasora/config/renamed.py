"""Keys and values that were renamed before 0.1.0, and the error that answers an old one."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

from megasora.errors import MegaSoraError

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
    "model.weights": "model.init_from",
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

Setting = tuple[str, Any]  # dotted key, value


def check_renamed_in_file(values: dict, path: str) -> None:
    """Raises MegaSoraError if a YAML mapping has old keys or values: names all of them and gives their new lines."""
    import yaml

    found = find_renamed(values)
    if not found:
        return
    tree: dict = {}
    for _, (key, value) in found:
        *sections, name = key.split(".")
        section = tree
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    lines = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).rstrip()
    raise MegaSoraError(f"{path}: {describe(found)}. The new lines:\n{lines}")


def check_renamed_in_overrides(layers: list[dict]) -> None:
    """Raises MegaSoraError if overrides have old keys or values: names all of them and gives the new overrides."""
    found = [pair for values in layers for pair in find_renamed(values)]
    if found:
        words = " ".join(shlex.quote(f"{key}={value}") for _, (key, value) in found)
        raise MegaSoraError(f"{describe(found)}. The new overrides: {words}")


def find_renamed(values: dict) -> list[tuple[Setting, Setting]]:
    """(old, new) of each setting in a nested mapping that was renamed."""
    pairs = [(setting, rename(*setting)) for setting in leaves(values)]
    return [(old, new) for old, new in pairs if old != new]


def rename(key: str, value: Any) -> Setting:
    """The current key and value of a setting."""
    old, new = renamed_prefix(key)
    key = new + key.removeprefix(old)
    return key, RENAMED_VALUES.get(key, {}).get(value, value) if isinstance(value, str) else value


def renamed_prefix(key: str) -> tuple[str, str]:
    """The entry of RENAMED for a key or for its section, or (key, key)."""
    return next((pair for pair in RENAMED.items() if key == pair[0] or key.startswith(pair[0] + ".")), (key, key))


def leaves(values: dict, prefix: str = "") -> Iterator[Setting]:
    """(dotted key, value) of everything in a nested mapping that is not itself a mapping."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            yield from leaves(value, f"{key}.")
        else:
            yield key, value


def describe(found: list[tuple[Setting, Setting]]) -> str:
    """`optim.rate was renamed to optim.lr; ...`; a section is named once, a value only if it was renamed too."""
    sentences = []
    for (old, value), (new, new_value) in found:
        if value == new_value:
            old, new = renamed_prefix(old)
            sentences.append(f"{old} was renamed to {new}")
        else:
            sentences.append(f"{old}={value} was renamed to {new}={new_value}")
    return "; ".join(dict.fromkeys(sentences))
