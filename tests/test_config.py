"""The configuration tree: which YAML files, overrides and values are accepted, and the messages for all others."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from megasora.cli import main
from megasora.config import (
    Config,
    ModelConfig,
    differences,
    every_key,
    load,
    load_run_config,
    parse_size,
    to_yaml,
    token_pixels,
)
from megasora.config.load import NAMES_ELSEWHERE
from megasora.config.renamed import RENAMED, RENAMED_VALUES
from megasora.config.schema import find_section
from megasora.errors import MegaSoraError

PRESETS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))
MILLION, BILLION = 10**6, 10**9
PARAMETERS = {  # range for each preset; the cross-attention to the caption comes on top of the DiT paper's sizes
    "dit_s": (30 * MILLION, 50 * MILLION),
    "dit_b": (120 * MILLION, 180 * MILLION),
    "dit_l": (450 * MILLION, 600 * MILLION),
    "dit_xl": (650 * MILLION, 900 * MILLION),
    "dit_1b": (1.0 * BILLION, 1.5 * BILLION),
    "dit_7b": (6.5 * BILLION, 7.5 * BILLION),
    "dit_30b": (27 * BILLION, 33 * BILLION),
}
CHOICES = [key.rsplit(".", 1)[1] for key in every_key() if key.startswith("objective.frame_conditioning.")]
each_preset = pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)


def entry_point(path):
    return "train_codec" if path.stem.startswith("vae_") else "train"


def message(overrides=(), path=None):
    """The error of `load`, in one line."""
    with pytest.raises(MegaSoraError) as caught:
        load(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# ---- defaults, file, overrides


def test_the_defaults_are_valid():
    assert load() == Config()


def test_overrides_take_precedence_over_the_file_and_the_file_over_the_defaults(tmp_path):
    path = write(tmp_path, "run: {steps: 5, seed: 7}\noptim:\n  betas: [0.8, 0.95]\n")
    config = load(
        path, ["run.steps=9", "objective.frame_conditioning.first=0.5", "data.patch=[1,2,2]", "run.dir=runs/a=b"]
    )
    assert (config.run.steps, config.run.seed, config.run.device) == (9, 7, "auto")
    assert config.optim.betas == [0.8, 0.95] and config.data.patch == [1, 2, 2]
    assert config.objective.frame_conditioning.first == 0.5 and config.run.dir == "runs/a=b"
    assert dataclasses.is_dataclass(config.objective.frame_conditioning)


def test_the_last_of_two_overrides_takes_effect():
    assert load(None, ["run.steps=3", "run.steps=4"]).run.steps == 4


def test_an_integer_is_accepted_for_a_float():
    lr = load(None, ["optim.lr=1", "sample.fps=24"]).optim.lr
    assert lr == 1.0 and isinstance(lr, float)


def test_saved_yaml_loads_to_the_same_configuration(tmp_path):
    config = load(None, ["run.steps=9", "optim.lr=2.5e-5", "optim.betas=[0.8,0.9]", "text.name=t5", "text.path=a/b c"])
    assert load(write(tmp_path, to_yaml(config))) == config
    assert set(yaml.safe_load(to_yaml(config))) == {f.name for f in dataclasses.fields(Config)}


def test_an_empty_file_gives_the_defaults(tmp_path):
    assert load(write(tmp_path, "# nothing\n\n")) == Config()


# ---- unknown keys


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("model.depht=3", "model.depth"),
        ("model.with=3", "model.width"),
        ("depth=3", "model.depth"),
        ("optm.lr=3", "optim"),
        ("objective.frame_conditioning.frist=1", "objective.frame_conditioning.first"),
        ("run.lr=1", "optim.lr"),
        ("optim.learning_rate=1", "optim.lr"),
        ("data.batch_size=1", "data.packs_per_step"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(override, nearest):
    assert message([override]).endswith(f"'; did you mean '{nearest}'?")


def test_the_names_of_other_trainers_are_not_valid_and_ours_are():
    names = {key.rsplit(".", 1)[-1] for key in every_key()}
    assert not NAMES_ELSEWHERE.keys() & names and set(NAMES_ELSEWHERE.values()) <= set(every_key())


def test_an_unknown_key_without_a_similar_one_is_answered_with_the_known_keys():
    assert "unknown key 'zzqqzz'; known keys: run, data, ingest, codec" in message(["zzqqzz=1"])
    assert message(["wandb.zzqqzzqqzz=1"]).endswith("known keys: mode, project")


def test_the_message_for_an_unknown_key_in_a_file_names_the_file(tmp_path):
    path = write(tmp_path, "model:\n  widht: 3\n")
    assert message(path=path) == f"{path}: unknown key 'model.widht'; did you mean 'model.width'?"


def test_a_dotted_key_in_a_file_is_answered_with_its_section(tmp_path):
    for key, section in {
        "run.steps": "run: {steps: ...}",
        "data.token_drop.end": "data: {token_drop: {end: ...}}",
    }.items():
        path = write(tmp_path, f"{key}: 1\n")
        assert message(path=path) == f"{path}: unknown key '{key}'; a file has sections, {section}"


def test_every_key_lists_each_key_once_and_sections_hold_keys():
    keys = every_key(Config)
    assert len(keys) == len(set(keys)) and "objective.frame_conditioning.first" in keys and "run" in keys
    leaves = [k for k in keys if not any(other.startswith(k + ".") for other in keys)]
    values = yaml.safe_load(to_yaml(Config()))
    for key in leaves:
        value = values
        for part in key.split("."):
            value = value[part]
        assert not isinstance(value, dict)


# ---- renamed keys


def test_renamed_keys_are_not_valid_and_their_new_names_are():
    assert not RENAMED.keys() & set(every_key()) and set(RENAMED.values()) <= set(every_key())
    for key, values in RENAMED_VALUES.items():
        for old, new in values.items():
            assert f"{key}={old} was renamed to {key}={new}" in message([f"{key}={old}"])
            load(None, [f"{key}={new}"])


@pytest.mark.parametrize("key", sorted(RENAMED))
def test_a_renamed_key_is_answered_with_its_new_name(key):
    section = find_section(RENAMED[key])
    subkey = f".{dataclasses.fields(section)[0].name}" if section else ""
    if RENAMED[key] == "run.start":
        expected = f"{key}=1 was renamed to run.start=init:1. The new overrides: run.start=init:1"
    else:
        expected = f"{key} was renamed to {RENAMED[key]}. The new overrides: {RENAMED[key]}{subkey}=1"
    assert message([f"{key}{subkey}=1"]) == expected


def test_all_renamed_keys_of_the_overrides_are_named_with_the_new_overrides():
    text = message(["optim.rate=5e-3", "run.steps=3", "model.attention=plain", "data.weights=[3,1]"])
    assert text == (
        "optim.rate was renamed to optim.lr; model.attention=plain was renamed to model.attention_backend=math; "
        "data.weights was renamed to data.mixture_weights. "
        "The new overrides: optim.lr=5e-3 model.attention_backend=math 'data.mixture_weights=[3, 1]'"
    )


OLD_FILE = """\
run: {steps: 5}
optim: {rate: 2.0e-4, clip: 0.5, eps: 1.0e-8}
data:
  drop: {start: 0.5, epochs: 2.0}
  patch: [1, 2, 2]
model: {recompute: attention, qk_norm: width}
"""
NEW_LINES = """\
optim:
  lr: 2.0e-4
  max_grad_norm: 0.5
data:
  token_drop:
    start: 0.5
    epochs: 2.0
model:
  recompute: keep_attention
  qk_norm: across_heads"""


def test_all_renamed_keys_of_a_file_are_named_with_new_lines_that_load(tmp_path):
    path = write(tmp_path, OLD_FILE)
    with pytest.raises(MegaSoraError) as caught:
        load(path)
    text, _, lines = str(caught.value).partition(". In these sections, replace the old keys by:\n")
    assert text == (
        f"{path}: optim.rate was renamed to optim.lr; optim.clip was renamed to optim.max_grad_norm; "
        "data.drop was renamed to data.token_drop; "
        "model.recompute=attention was renamed to model.recompute=keep_attention; "
        "model.qk_norm=width was renamed to model.qk_norm=across_heads"
    )
    assert lines == NEW_LINES
    config = load(write(tmp_path, lines))
    assert (config.optim.lr, config.data.token_drop.start, config.model.qk_norm) == (2e-4, 0.5, "across_heads")


def test_renamed_and_unknown_keys_of_the_file_and_the_overrides_are_one_message(tmp_path):
    path = write(tmp_path, "optim: {rate: 1, bteas: 2}\nmodel: {widht: 3}\n")
    with pytest.raises(MegaSoraError) as caught:
        load(path, ["optim.ema=0.5", "model.depht=3", "data.drop.strat=0.5"])
    assert str(caught.value).splitlines() == [
        f"{path}: unknown key 'optim.bteas'; did you mean 'optim.betas'?",
        f"{path}: unknown key 'model.widht'; did you mean 'model.width'?",
        "override 'model.depht=3': unknown key 'model.depht'; did you mean 'model.depth'?",
        "override 'data.drop.strat=0.5': unknown key 'data.token_drop.strat'; did you mean 'data.token_drop.start'?",
        "optim.ema was renamed to optim.ema_decay; data.drop was renamed to data.token_drop. "
        "The new overrides: optim.ema_decay=0.5",
        f"{path}: optim.rate was renamed to optim.lr. In these sections, replace the old keys by:",
        "optim:",
        "  lr: 1",
    ]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("optim.rate=1", "optim.lr=2"),
        ("model.attention=plain", "model.attention_backend=sdpa"),
        ("data.drop.start=0.5", "data.token_drop.start=0.1"),
    ],
)
def test_an_old_and_a_new_key_together_are_an_error_that_keeps_the_new_one(old, new, tmp_path):
    (old_key, old_value), (new_key, new_value) = old.split("="), new.split("=")
    expected = f"{old_key} was renamed to {new_key}, and both are given; keep {new_key}"
    assert message([old, new]) == message([new, old]) == expected
    section, old_name, *rest = old_key.split(".")
    new_name = new_key.split(".")[1]
    if rest:
        old_value, new_value = f"{{{rest[0]}: {old_value}}}", f"{{{rest[0]}: {new_value}}}"
    path = write(tmp_path, f"{section}:\n  {old_name}: {old_value}\n  {new_name}: {new_value}\n")
    assert message(path=path) == f"{path}: {expected}"


@pytest.mark.parametrize("value", ["0.5", "null", "{}"])
def test_a_renamed_section_that_is_given_a_value_is_not_suggested_as_a_key(value):
    with pytest.raises(MegaSoraError) as caught:
        load(None, [f"data.drop={value}"])
    text = str(caught.value)
    assert text.splitlines()[-1] == "data.drop was renamed to data.token_drop" and "data.token_drop=" not in text
    if value != "{}":
        assert "data.token_drop is a section; give data.token_drop.<key>, one of start, end, epochs" in text


@pytest.mark.parametrize(
    ("saved", "keys"),
    [
        ("optim: {rate: 1.0, lr: 2.0}\n", "optim.rate"),
        ("model: {recompute: attention}\n", "model.recompute"),
        ("optim: {rate: 1.0, clip: 0.5, ema: 0.9}\nmodel: {gone: 1}\n", "optim.rate, optim.clip, optim.ema, ..."),
        ("optim: {momentum: 0.9}\n", "optim.momentum"),
    ],
)
def test_a_run_folder_with_other_keys_is_of_another_version(saved, keys, tmp_path):
    (tmp_path / "config.yaml").write_text(saved)
    with pytest.raises(MegaSoraError) as caught:
        load_run_config(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / 'config.yaml'} was written by a version of MegaSora with other configuration keys ({keys}); "
        "start again in another run.dir"
    )


def test_a_run_folder_of_this_version_gives_its_configuration(tmp_path):
    config = load(None, ["run.steps=9"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_run_config(tmp_path) == config


@pytest.mark.parametrize("command", ["train", "sample", "report"])
def test_a_run_folder_of_another_version_ends_each_command_with_one_line_and_exit_code_2(command, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(Config()).replace("  lr: 0.0001", "  rate: 0.0001"))
    arguments = {
        "train": [str(write(tmp_path, "")), f"run.dir={run}"],
        "sample": [str(run), "--prompt", "a", "--out", str(tmp_path / "a.mp4")],
        "report": [str(run)],
    }
    assert main([command, *arguments[command]]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"megasora: error: {run / 'config.yaml'} was written by a version of MegaSora with other")
    assert "(optim.rate)" in error and error.count("\n") == 1


# ---- values of the wrong type


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.steps=many", r"run.steps=many must be a whole number"),
        ("run.steps=1.5", r"run.steps=1.5 must be a whole number"),
        ("optim.lr=fast", r"optim.lr=fast must be a number"),
        ("run.ledger=maybe", r"run.ledger=maybe must be true or false"),
        ("codec.factors=[4,8,x]", r"codec.factors\[2\]=x must be a whole number"),
        ("codec.factors=4", r"codec.factors=4 must be a list"),
        ("optim.betas[0]=0.5", r"give a list as a whole, e.g. optim.betas=\[0.9,0.99\]"),
        ("model=3", r"model is a section; give model.<key>, one of width, depth"),
        ("run.steps", r"override 'run.steps' is not of the form key.path=value"),
        ("=3", r"override '=3' is not of the form key.path=value"),
        ("run.dir=${nothing}", r"run.dir=\${nothing}: \${...} is not expanded; write the value out"),
        ("run.seed=-1", r"run.seed=-1 must be at least 0 and at most 9223372036854775807"),
        ("optim.eps=nan", r"optim.eps=nan must be above 0 and at most 1"),
        ("objective.logit_mean=inf", r"objective.logit_mean=inf must be at least -20 and at most 20"),
        ("objective.frame_conditioning.first=nan", r"objective.frame_conditioning.first=nan must be at least 0"),
    ],
)
def test_the_message_for_a_wrong_value_names_its_key(override, expected):
    assert re.search(expected, message([override]))


# ---- files that are not a configuration


def test_yaml_aliases_are_rejected_before_they_are_expanded(tmp_path):
    bomb = "a: &a [x, x]\n" + "".join(
        f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghijk", "bcdefghijkl", strict=True)
    )
    assert "YAML aliases (*name) are not accepted" in message(path=write(tmp_path, bomb))
    assert "YAML aliases (*name) are not accepted" in message(["run.dir=*a"])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("- 1\n- 2\n", "holds a list; a configuration is a mapping of sections"),
        ("run: {steps: 3", "is not valid YAML"),
        ("run:\n  steps: 3\n  steps: 4\n", "run.steps occurs twice, lines 2 and 3"),
        ("run:\n", "run is a section; give run.<key>"),
        ("!!python/object:os.system {}\n", "YAML tags (!name) are not accepted"),
        ("run: {steps: 1}\n---\nrun: {steps: 2}\n", "is not valid YAML: expected a single document"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        ("#" * ((1 << 20) + 1), "cannot be read: more than 1048576 bytes"),
    ],
)
def test_the_message_for_a_file_that_is_not_a_configuration_names_it(tmp_path, content, expected):
    path = write(tmp_path, content)
    text = message(path=path)
    assert text.startswith(str(path)) and expected in text


def test_a_missing_file_is_answered_with_the_nearest(tmp_path):
    path = write(tmp_path, "run: {steps: 1}")
    assert message(path=tmp_path / "rnu.yaml") == f"no configuration file {tmp_path / 'rnu.yaml'}; did you mean {path}?"


# ---- values that are not accepted


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.width=100", "model.heads=3"], "model.heads=3 must divide model.width=100; use 1, 2, 5"),
        (["model.width=64", "model.heads=16"], "model.width=64 / model.heads=16 = 4: the head dim must be even"),
        (["model.width=7", "model.heads=2"], "model.heads=2 must divide model.width=7; use an even width"),
        (["model.attention_backend=cudnn"], "model.attention_backend=cudnn sums gradients in an order that differs"),
        (["model.mlp_ratio=0.002"], "model.mlp_ratio=0.002 x model.width=384 is less than 1, the hidden features"),
        (["model.width=63", "model.heads=9"], "model.width=63 / model.heads=9 = 7: the head dim must be even"),
        (["codec.channels=769"], "codec.channels=769 must be from 3 to 3 x 4 x 8 x 8 = 768"),
        (["codec.factors=[2,4]"], "codec.factors=[2, 4] must be three whole numbers: frames, height, width"),
        (["data.patch=[1,0,1]"], "data.patch[1]=0 must be at least 1 and at most 64"),
        (["data.patch=[2,1,1]"], "data.patch=[2, 1, 1]: the first must be 1; raise codec.factors[0] for longer tokens"),
        (["text.name=t5"], "text.name=t5 needs text.path, a folder or a hub name of its weights"),
        (["text.name=byte"], "text.name=byte must be one of bytes, t5, clip; did you mean bytes?"),
        (["wandb.mode=onlin"], "wandb.mode=onlin must be one of offline, online, disabled; did you mean online?"),
        (["parallel.zero_stage=4"], "parallel.zero_stage=4 must be at least 0 and at most 3"),
        (["optim.betas=[0.9]"], "optim.betas=[0.9] must be two numbers"),
        (["optim.betas=[0.9,1.0]"], "optim.betas[1]=1.0 must be at least 0 and below 1"),
        (["optim.ema_decay=1"], "optim.ema_decay=1.0 must be at least 0 and below 1"),
        (["optim.lr=0"], "optim.lr=0.0 must be above 0 and at most 100"),
        (["objective.caption_dropout=1"], "objective.caption_dropout=1.0 must be at least 0 and below 1"),
        (["objective.frame_conditioning.first=-1"], "frame_conditioning.first=-1.0 must be at least 0"),
        ([f"objective.frame_conditioning.{k}=0" for k in CHOICES], "must not all be zero"),
        (["optim.min_lr_ratio=1.5"], "optim.min_lr_ratio=1.5 must be at least 0 and at most 1"),
        (["data.tokens_per_pack=0"], "data.tokens_per_pack=0 must be at least 1"),
        (["evaluation.prompts=4"], "evaluation.prompts=4 must be 0 or a multiple of 16, e.g. 48"),
        (["evaluation.prompts=-16"], "evaluation.prompts=-16 must be at least 0"),
        (
            ["data.mixture=[a,b]", "data.mixture_weights=[3.0]"],
            "data.mixture=['a', 'b'] has 2 folders, data.mixture_weights=[3.0] 1 weight; give one weight per folder",
        ),
        (["data.mixture=[a,a]", "data.mixture_weights=[3,1]"], "data.mixture=['a', 'a']: a occurs twice"),
        (["sample.size=48"], "sample.size=48 is not HEIGHTxWIDTH in pixels, e.g. 48x80"),
        (["sample.size=48x0"], "sample.size=48x0 is not HEIGHTxWIDTH in pixels"),
        (["model.width=99999999999", "model.heads=7"], "model.width=99999999999 must be at least 1 and at most"),
        (
            ["model.width=131072", "model.heads=1024", "model.depth=1000"],
            "model.width=131072, model.depth=1000 and model.mlp_ratio=4.0 make about 2.7e+14 weights; at most 1e+13",
        ),
    ],
)  # fmt: skip
def test_the_message_for_a_value_that_is_not_accepted_has_the_numbers(overrides, expected):
    assert expected in message(overrides)


@pytest.mark.parametrize("heads", [5, 7, 9, 40, 400])
def test_the_suggested_numbers_of_heads_are_accepted(heads):
    text = message(["model.width=96", f"model.heads={heads}"])
    suggested = [int(n) for n in text.split("use ")[1].split(", ")]
    for n in suggested:
        load(None, ["model.width=96", f"model.heads={n}"])


def test_a_size_is_height_by_width():
    assert parse_size("48x80", "key") == (48, 80) and parse_size("48X80", "key") == (48, 80)


def test_a_token_covers_the_codec_factors_times_the_patch():
    assert token_pixels(load(None, ["codec.factors=[2,4,8]", "data.patch=[1,2,3]"])) == (2, 8, 24)


# ---- differences


def test_differences_name_each_changed_key_with_both_values():
    old = load()
    new = load(None, ["run.steps=7", "data.patch=[1,2,2]", "objective.frame_conditioning.first=0.5"])
    assert differences(new, old) == [
        "run.steps: 100000 -> 7",
        "data.patch: [1, 1, 1] -> [1, 2, 2]",
        "objective.frame_conditioning.first: 0.15 -> 0.5",
    ]
    assert differences(new, new) == []


def test_differences_can_ignore_a_key_or_a_section():
    new = load(None, ["run.steps=7", "sample.num_inference_steps=3", "sample.guidance_scale=1", "model.depth=3"])
    assert differences(new, load(), ignore=("run.steps", "sample")) == ["model.depth: 12 -> 3"]


# ---- presets


@each_preset
def test_a_preset_loads_and_its_header_has_purpose_hardware_and_launch_command(path):
    load(path)
    comment = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    data = "data.clips=" if entry_point(path) == "train_codec" else "data.shards="
    command = f"megasora.{entry_point(path)} configs/{path.name}"
    for part in ("Purpose:", "Hardware:", "Launch:", command, "run.dir=", data):
        assert part in comment


@each_preset
def test_a_preset_has_only_keys_that_differ_from_the_defaults(path):
    def leaves(values, prefix=""):
        for key, value in values.items():
            if isinstance(value, dict):
                yield from leaves(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}"

    changed = {line.split(":")[0] for line in differences(load(path), Config())}
    assert set(leaves(yaml.safe_load(path.read_text()))) == changed


def test_the_number_of_parameters_of_a_preset_is_in_the_range_of_its_name_and_in_its_header():
    from megasora.build import patch_dim
    from megasora.model.flops import num_parameters

    sizes = {}
    for path in PRESETS:
        if path.stem.startswith("dit_"):
            config = load(path)
            sizes[path.stem] = num_parameters(config.model, patch_dim(config))
            low, high = PARAMETERS[path.stem]
            assert low <= sizes[path.stem] <= high
            written = re.search(r"Parameters: ([\d.]+) ([MB])", path.read_text())
            unit = MILLION if written[2] == "M" else BILLION
            assert float(written[1]) * unit == pytest.approx(sizes[path.stem], rel=0.01)
    assert sizes.keys() == PARAMETERS.keys()


@each_preset
def test_the_matrix_sizes_of_a_preset_are_multiples_of_64_and_of_its_head_dim_of_8(path):
    model: ModelConfig = load(path).model
    assert model.width % 64 == 0 and model.mlp_hidden % 64 == 0
    assert model.head_dim % 8 == 0


def test_larger_presets_have_longer_packs_and_recompute():
    order = [load(p) for p in sorted((p for p in PRESETS if p.stem in PARAMETERS), key=lambda p: PARAMETERS[p.stem])]
    packs = [c.data.tokens_per_pack for c in order]
    assert packs == sorted(packs) and packs[0] < packs[-1]
    large = [c for c in order if c.model.width * c.model.depth > 40_000]
    assert len(large) == 3 and all(c.model.recompute != "none" and c.model.modulation == "shared" for c in large)


def processes_of(path) -> int:
    """Processes of the launch command in the header: processes per node times nodes."""
    counts = dict(re.findall(r"--(nproc-per-node|nnodes) (\d+)", path.read_text()))
    return int(counts["nproc-per-node"]) * int(counts.get("nnodes", 1))


@each_preset
def test_the_launch_command_of_a_preset_has_a_legal_layout_with_the_tensor_axis_within_a_node(path):
    from megasora.parallel.layout import check_codec_layout, check_layout

    config = load(path)
    (check_codec_layout if config.codec.name == "vae" else check_layout)(config, processes_of(path))
    assert int(re.search(r"--nproc-per-node (\d+)", path.read_text())[1]) % config.parallel.tensor == 0


@pytest.mark.parametrize("path", [p for p in PRESETS if p.stem in PARAMETERS], ids=lambda p: p.stem)
def test_the_memory_per_gpu_in_the_header_of_a_preset_is_what_its_settings_give(path):
    """In bf16, without captions, text embedder and libraries; activations by the formula of benchmarks/memory.py."""
    from megasora.build import patch_dim
    from megasora.model.flops import num_parameters
    from megasora.parallel.layout import resolve_zero_stage

    config = load(path)
    model, parallel = config.model, config.parallel
    weights = num_parameters(model, patch_dim(config)) / parallel.tensor / parallel.pipeline
    sharded_by = processes_of(path) / parallel.tensor / parallel.pipeline
    gradients = 4 * weights / (1 if resolve_zero_stage(parallel, "cuda") == 1 else sharded_by)
    states = 16 * weights / sharded_by  # fp32: master weights, two moments, EMA
    tokens = config.data.tokens_per_pack / parallel.context / parallel.tensor
    full_block = (34 * model.width + 2 * model.mlp_hidden) * tokens
    recomputing_block = {"none": 0, "full": 2, "keep_attention": 4}[model.recompute] * model.width * tokens
    recomputing = 0 if model.recompute == "none" else model.recompute_blocks or model.depth
    full = model.depth - recomputing + min(recomputing, 1)  # one block at a time is recomputed
    activations = recomputing * recomputing_block + full * full_block
    buffers = 4 * min(500_000_000, weights)
    total = (2 * weights + gradients + states + activations + buffers) / 1e9
    written = float(re.search(r"[Aa]bout (\d+) GB each", path.read_text())[1])
    assert written == pytest.approx(total, rel=0.1, abs=1)
