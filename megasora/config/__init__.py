"""Every setting of a run, as one tree of dataclasses.

schema.py: the dataclasses, with all defaults and bounds (field_rules.py). load.py: `load`, `load_run_config` and
`to_yaml`. yaml_text.py: YAML as letters. convert.py: letters to values. validate.py: checks of values that need neither
data nor a process group. renamed.py: old keys. Nothing is read from the environment.
"""

from megasora.config.load import load, load_run_config, read_yaml, to_yaml
from megasora.config.schema import (
    AdversarialConfig,
    CodecConfig,
    Config,
    DataConfig,
    FrameConditioningConfig,
    IngestConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    ParallelConfig,
    ReconstructionConfig,
    RunConfig,
    SampleConfig,
    TextConfig,
    TokenDropConfig,
    VAEConfig,
    WandbConfig,
    differences,
    every_key,
    token_pixels,
)
from megasora.config.validate import parse_size

__all__ = [
    "AdversarialConfig",
    "CodecConfig",
    "Config",
    "DataConfig",
    "FrameConditioningConfig",
    "IngestConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "ParallelConfig",
    "ReconstructionConfig",
    "RunConfig",
    "SampleConfig",
    "TextConfig",
    "TokenDropConfig",
    "VAEConfig",
    "WandbConfig",
    "differences",
    "every_key",
    "load",
    "load_run_config",
    "parse_size",
    "read_yaml",
    "to_yaml",
    "token_pixels",
]
