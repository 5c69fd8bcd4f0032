"""Settings that no one would write by intent, and texts that look like numbers: one line each, or the letters kept."""

from __future__ import annotations

import dataclasses
import os
import random
import resource
import socket
import time
import typing
from pathlib import Path

import pytest
import yaml

from megasora.cli import main
from megasora.config import Config, every_key, load, to_yaml
from megasora.config.field_rules import BOUNDS, Bounds, Exclusive, above, below
from megasora.config.load import read_yaml
from megasora.config.schema import find_section
from megasora.config.yaml_text import MAX_EVENTS, letters, parse_yaml
from megasora.errors import MegaSoraError

SECONDS = 5.0


def message(overrides=(), path=None):
    """The error of `load`: one printable line, in little time."""
    start = time.process_time()
    with pytest.raises(MegaSoraError) as caught:
        load(path, overrides)
    assert time.process_time() - start < SECONDS
    text = str(caught.value)
    assert text.isprintable() and len(text) < 1000, text
    return text


def fields() -> dict[str, tuple[typing.Any, dataclasses.Field]]:
    """Dotted key -> (type, field) of every setting."""
    found = {}
    for key in every_key():
        section, _, name = key.rpartition(".")
        if section and not find_section(key):
            schema = find_section(section)
            found[key] = typing.get_type_hints(schema)[name], schema.__dataclass_fields__[name]
    return found


FIELDS = fields()
KIND = {key: (typing.get_args(kind) or (kind,))[0] for key, (kind, _) in FIELDS.items()}
LISTS = {key for key, (kind, _) in FIELDS.items() if typing.get_origin(kind) is list}
NUMBERS = [key for key, kind in KIND.items() if kind in (int, float)]
TEXTS = [key for key, kind in KIND.items() if kind is str and key not in LISTS]


def value_of(config, key):
    for name in key.split("."):
        config = getattr(config, name)
    return config


def as_value(key: str, item: str) -> str:
    return f"[{item or 'null'}]" if key in LISTS else item


# ---------------------------------------------------------------- every key


def test_every_number_has_bounds_that_contain_its_default():
    config = Config()
    for key in NUMBERS:
        bounds: Bounds = FIELDS[key][1].metadata[BOUNDS]
        default = value_of(config, key)
        assert all(map(bounds.contain, default if key in LISTS else [default])), key
        assert not bounds.contain(float("nan")) and not bounds.contain(float("inf")) and not bounds.contain(-1e300)
    assert len(NUMBERS) > 60


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "words"),
    [
        (Bounds(1, 3), [1, 2, 3], [0.9, 3.1], "at least 1 and at most 3"),
        (Bounds(above(0), 1), [1e-300, 1], [0, 1.1], "above 0 and at most 1"),
        (Bounds(0, below(1)), [0, 0.999], [1, -1e-300], "at least 0 and below 1"),
    ],
)
def test_exclusive_ends_do_not_belong_to_the_interval(bounds, inside, outside, words):
    assert all(map(bounds.contain, inside)) and not any(map(bounds.contain, outside)) and str(bounds) == words


HOSTILE_NUMBERS = [
    "", "x", "true", "null", "1e400", "-1e400", "nan", ".inf", "9" * 30, "9" * 5000, "-" + "9" * 30, "1e999999999",
    "0x10", "1:30", "1 2", "१२", "--1", "1__0", "1/2", "${oc.env:HOME}", "{a: 1}", "[1", "'", "1.5.2", "[[[[1]]]]",
]  # fmt: skip


@pytest.mark.parametrize("item", HOSTILE_NUMBERS, ids=lambda text: text[:12])
def test_no_number_takes_a_hostile_value_and_the_message_names_the_key(item):
    for key in NUMBERS:
        assert key in message([f"{key}={as_value(key, item)}"]), key


def test_no_number_takes_a_value_beyond_its_bounds():
    for key in NUMBERS:
        bounds = FIELDS[key][1].metadata[BOUNDS]
        for end, step in ((bounds.low, -1), (bounds.high, 1)):
            beyond = end.value if isinstance(end, Exclusive) else end + step
            expected = f"{key}{'[0]' if key in LISTS else ''}={KIND[key](beyond)} must be {bounds}"
            assert message([f"{key}={as_value(key, repr(beyond))}"]) == expected


def test_a_whole_number_is_accepted_in_every_form_and_a_fraction_is_not():
    for text in ("1000", "1_000", "1e3", "1E+3", "1000.0", "+1000", "0001000", "'1000'", '"1000"'):
        steps = load(None, [f"run.steps={text}"]).run.steps
        assert steps == 1000 and type(steps) is int
    for text in ("1.5", "1e-3", "1000.0001"):
        assert message([f"run.steps={text}"]) == f"run.steps={text} must be a whole number"


def test_bools_are_words_or_0_and_1():
    bools = [key for key, kind in KIND.items() if kind is bool]
    words = {"true": True, "False": False, "yes": True, "OFF": False, "1": True, "0": False}
    for key in bools:
        for text in ("2", "", "null", "1.0", "[true]", "nan"):
            assert message([f"{key}={text}"]).startswith(f"{key}={text} must be")
    for text, expected in words.items():
        assert load(None, [f"run.ledger={text}"]).run.ledger is expected


# ---------------------------------------------------------------- texts

LETTERS = [
    "0042", "off", "12:30", "1e5", "null", "yes", "1.10", "a=b", "#x", "a #x", "[x]", "{x: y}", "1_000", "- a",
    "0x10", "a: b", "it's", "'a' and 'b'", "2024-01-01", ".inf", "true", "=", "日本", "a b", " a", "%x", "@x", "|", "?",
    "&a", "s3://b/c?x=1", "C:\\new", "<<",
]  # fmt: skip


@pytest.mark.parametrize("text", LETTERS)
def test_a_text_keeps_its_letters_in_overrides_and_files_and_saved_configurations(text, tmp_path):
    assert load(None, [f"run.dir={text}"]).run.dir == text
    config = load(None, [f"wandb.project={text}", f"data.mixture={yaml.safe_dump([text])}", "data.mixture_weights=[1]"])
    assert config.wandb.project == text and config.data.mixture == [text]
    path = tmp_path / "saved.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load(path) == config
    assert yaml.safe_load(to_yaml(config))["wandb"]["project"] == text  # also for other readers of YAML


PLAIN = ["0042", "off", "12:30", "1e5", "null", "yes", "1.10", "a=b", "1_000", "2024-01-01", "0x10", ".inf", "true"]


@pytest.mark.parametrize("text", PLAIN)
def test_a_text_without_quotes_in_a_file_keeps_its_letters(text, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"wandb: {{project: {text}}}\nrun:\n  dir: {text} # folder\ndata:\n  mixture: [{text}, b]\n")
    values = read_yaml(path)
    assert values == {"wandb": {"project": text}, "run": {"dir": text}, "data": {"mixture": [text, "b"]}}
    path.write_text(f"wandb: {{project: {text}}}\nrun:\n  dir: {text} # folder\n")
    config = load(path)
    assert (config.wandb.project, config.run.dir) == (text, text)


def test_quotes_around_a_whole_value_are_those_of_yaml():
    for text in ("'*a'", '"*a"'):
        assert load(None, [f"run.dir={text}"]).run.dir == "*a"
    assert load(None, ["data.shards=''"]).data.shards == ""


def test_random_texts_survive_a_saved_configuration(tmp_path):
    generator = random.Random(0)
    alphabet = "ab01 :#-?|>%@`!&*{}[],\"'\\~=.<\u00e9\u3000\U0001f600"
    path = tmp_path / "saved.yaml"
    for _ in range(200):
        text = "".join(generator.choices(alphabet, k=generator.randrange(1, 12))).lstrip("~")
        config = Config()
        config.wandb.project, config.data.mixture, config.data.mixture_weights = text, [text], [1.0]
        path.write_text(to_yaml(config), encoding="utf-8")
        assert load(path) == config


def test_random_numbers_survive_a_saved_configuration(tmp_path):
    generator = random.Random(0)
    path = tmp_path / "saved.yaml"
    for _ in range(50):
        config = Config()
        config.optim.lr = generator.uniform(0, 1) * 10.0 ** generator.randrange(-300, 1) or 1.0
        config.run.seed, config.optim.betas = generator.getrandbits(63), [generator.random(), generator.random()]
        path.write_text(to_yaml(config))
        assert load(path) == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a\0b", "U+0000"),
        ("a\nb", "U+000A"),
        ("\x1b[31mred", "U+001B"),
        ("a\u2028b", "U+2028"),
        ("caf\udce9", "U+DCE9"),
        ("x" * 5000, "has 5000 characters; at most 4096"),
        ("${oc.env:HOME}", "${...} is not expanded"),
        ("runs/${run.seed}", "${...} is not expanded"),
        ("!!python/object/apply:os.system ['id']", "YAML tags (!name) are not accepted"),
        ("!x", "YAML tags (!name) are not accepted"),
        ("*a", "YAML aliases (*name) are not accepted"),
    ],
)
def test_no_text_takes_control_characters_interpolations_tags_or_aliases(text, words):
    for key in TEXTS:
        error = message([f"{key}={text}"])
        assert key in error and words in error


def test_the_home_folder_is_expanded_in_paths_only(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    config = load(None, ["run.dir=~/a b/", "run.start=init:~", "data.mixture=[~/x, y]", "data.mixture_weights=[1,2]"])
    assert (config.run.dir, config.run.start) == ("/home/ann/a b/", "init:/home/ann")
    assert config.data.mixture == ["/home/ann/x", "y"]
    assert load(None, ["run.dir=~root/x"]).run.dir == os.path.expanduser("~root/x") != "~root/x"
    assert load(None, ["wandb.project=~"]).wandb.project == "~"
    assert message(["data.shards=~nobody-of-this-name/x"]).endswith("there is no user nobody-of-this-name")


@pytest.mark.parametrize("folder", ["", " ", "/", "//"])
def test_a_run_folder_has_a_name(folder):
    assert message([f"run.dir={folder}"]).startswith(f"run.dir={folder} is no folder of a run")


def test_nothing_of_the_environment_reaches_a_configuration(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret-of-ann")
    for text in ("${oc.env:WANDB_API_KEY}", "$WANDB_API_KEY", "${WANDB_API_KEY}", "${env:WANDB_API_KEY}"):
        try:
            dump = to_yaml(load(None, [f"wandb.project={text}"]))
        except MegaSoraError as error:
            dump = str(error)
        assert "secret-of-ann" not in dump


@pytest.mark.parametrize("size", ["9" * 5000 + "x3", "३x३", "100000x1", "-1x2", "1e3x1", "0x3", "4x4x4", "\x1b[2Jx3"])
def test_a_size_is_two_numbers_of_pixels(size):
    assert "sample.size=" in message([f"sample.size={size}"])


# ---------------------------------------------------------------- keys of overrides


@pytest.mark.parametrize(
    "text",
    [
        "a." * 10_000 + "b=1", "k" * 100_000 + "=1", "run..steps=1", ".run=1", "run.=1", "run.steps.x=1", "=", "==",
        "run.\x1b[31m=1", "codec.factors=" + "[" * 10_000, "data.token_drop=" + "{a: " * 10_000,
        "run.steps=" + "9" * 9000,
        "data.mixture=!!python/name:os.system ''", "data.token_drop={<<: {start: 1}}", "model={depth: 3, depth: 4}",
        "codec.factors=[1, 2, *a]", "data.mixture=" + str(["a"] * MAX_EVENTS), "__class__=1", "run.__class__=1",
        "data.token_drop=[1]", "run=", "zzqq.x=" + "[" * 10_000,
    ],
    ids=lambda text: text[:24],
)  # fmt: skip
def test_a_hostile_override_is_one_line(text):
    message([text])


# ---------------------------------------------------------------- files

DEEP = 10_000
FILES = {  # name -> (content, words of the error)
    "deep flow list": ("a: " + "[" * DEEP, "nested more than"),
    "deep flow mapping": ("{a: " * DEEP, "nested more than"),
    "deep block list": ("- " * DEEP + "x", "nested more than"),
    "deep block mapping": ("".join(f"{' ' * i}a:\n" for i in range(300)), "nested more than"),
    "deep complex keys": ("? " * DEEP, "the key in line 1 is not a word"),
    "long integer": ("run: {steps: " + "9" * 5000 + "}", "run.steps=999"),
    "alias bomb": ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "YAML aliases (*name)"),
    "merge key": ("run:\n  <<: {steps: 3}\n", "unknown key 'run.<<'"),
    "merged alias": ("x: &x {steps: 3}\nrun: {<<: *x}\n", "YAML aliases (*name)"),
    "python object": ("run: !!python/object/apply:os.system ['touch /tmp/pwned']\n", "YAML tags (!name)"),
    "python tag of a text": ("run: {dir: !!python/str x}\n", "YAML tags (!name)"),
    "a standard tag": ("run: {dir: !!str 5}\n", "YAML tags (!name)"),
    "binary": ("run: {dir: !!binary aGk=}\n", "YAML tags (!name)"),
    "a tag of its own": ("run: !x {dir: a}\n", "YAML tags (!name)"),
    "a tag directive": ("%TAG ! tag:yaml.org,2002:python/\n---\nrun: !object:os.system {}\n", "YAML tags (!name)"),
    "equal keys": ("run: {steps: 1}\nrun: {steps: 2}\n", "run occurs twice, lines 1 and 2"),
    "a tab": ("run:\n\tsteps: 3\n", "is not valid YAML: found character '\\t'"),
    "a NUL byte": ("run: {dir: 'a\0b'}\n", "is not valid YAML"),
    "UTF-16": ("run: {steps: 3}\n".encode("utf-16"), "is not UTF-8 text"),
    "Latin-1": ("run: {dir: caf\xe9}\n".encode("latin-1"), "is not UTF-8 text"),
    "an interpolation": ("wandb: {project: '${oc.env:HOME}'}\n", "${...} is not expanded"),
    "a list": ("- run\n", "holds a list"),
    "a text": ("hello\n", "holds a text"),
    "a key of a list": ("? [a, b]\n: c\n", "the key in line 1 is not a word"),
    "two documents": ("run: {steps: 1}\n---\nrun: {steps: 2}\n", "expected a single document"),
    "a section without keys": ("run:\n", "run is a section"),
    "JSON of many keys": ("{" + ",".join(f'"k{i}": {i}' for i in range(MAX_EVENTS)) + "}", "more than 20000 keys"),
    "a mapping for a text": ("run: {dir: {a: b}}\n", "run.dir={a: b} must be text; put it in quotes"),
    "control codes in a key": ('"\\e[31mred": 1\n', "unknown key '\\x1b[31mred'"),
    "only brackets": ("}" * 1000, "is not valid YAML"),
    "a web page": ("<!DOCTYPE html><html><body>404</body></html>", "holds a text"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_one_line_that_names_it(name, tmp_path):
    content, words = FILES[name]
    path = tmp_path / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    error = message(path=path)
    assert error.startswith(str(path)) and words in error
    assert not Path("/tmp/pwned").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"# nothing\r\n", b"\xef\xbb\xbf", b"---\n", b"--- # x\n...\n", b"{}", b"\xef\xbb\xbf{}\r\n"],
)
def test_an_empty_file_gives_the_defaults(content, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    assert load(path) == Config()


def test_a_byte_order_mark_and_carriage_returns_are_accepted(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbfrun:\r\n  steps: 5\r\n  dir: a b\r\n")
    config = load(path)
    assert (config.run.steps, config.run.dir) == (5, "a b")


def test_a_message_has_at_most_some_of_many_unknown_keys(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("".join(f"key{i}: {i}\n" for i in range(5000)))
    with pytest.raises(MegaSoraError) as caught:
        load(path)
    assert len(str(caught.value).splitlines()) == 20


def make_path(kind: str, path: Path) -> None:
    if kind == "folder":
        path.mkdir()
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "dangling link":
        path.symlink_to("nothing")
    elif kind == "huge":
        with open(path, "wb") as file:
            file.truncate(1 << 40)


@pytest.mark.parametrize(
    "kind", ["folder", "FIFO", "socket", "device", "link to itself", "dangling link", "huge", "missing"]
)
def test_a_configuration_that_is_no_file_is_one_line_and_never_blocks(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    path = tmp_path / "run.yaml"
    make_path(kind, path)
    assert str(path) in message(path=path)
    assert main(["train", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_name_that_no_file_can_have_is_one_line():
    for name in ("a\0b", "x" * 5000, "a" * 300 + "/b"):
        with pytest.raises(MegaSoraError, match="configuration file|cannot be read"):
            load(name)


def test_the_largest_files_take_little_memory(tmp_path):
    path = tmp_path / "run.yaml"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for text in ("a: '" + "x" * (1 << 20), "a: [" + "1," * 500_000, "[" * (1 << 20), "# " * 500_000 + "\n- a"):
        path.write_text(text[: (1 << 20) - 1])
        message(path=path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB


# ---------------------------------------------------------------- letters


def test_letters_are_what_parse_yaml_reads_back():
    tree = {"a": ["1", "x: y", "", "it's", "[", "null"], "b": {"c": "~", "d": "0042"}}
    assert parse_yaml(letters(tree), "text") == tree
    assert letters(["1", "2.0"]) == "[1, 2.0]" and letters("off") == "off"
