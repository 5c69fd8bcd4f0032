"""The import order of megasora, read from the sources; imports inside functions count too."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "megasora"

# Base layers first. A unit (a file or a folder of megasora/) imports only units of lower layers.
LAYERS = [
    {"errors"},
    {"files", "locks", "jsonl", "stop", "placement", "device_transfer"},
    {"config", "batch", "kernels", "fragment", "random_numbers"},
    {"model", "diffusion", "codec", "text", "data", "parallel", "optim", "checkpoint"},
    {"formats"},
    {"run_log", "testing", "build", "ingest"},
    {"parallelize", "parallelize_codec", "training_state", "sampling", "observe", "watchdog"},
    {"tasks", "checks", "preflight", "commands", "web"},
    {"training_steps"},
    {"trainer", "sample_ranks"},
    {"train", "sample"},
    {"cli", "train_codec"},
]
BASE = {unit for layer in LAYERS[:3] for unit in layer}
INDEPENDENT = LAYERS[3]  # units that import only base layers
LAYER_OF = {unit: index for index, layer in enumerate(LAYERS) for unit in layer}
FILES = sorted(p for p in PACKAGE.rglob("*.py") if "kernels" not in p.relative_to(PACKAGE).parts)
FILES += sorted((PACKAGE / "kernels").glob("*.py"))  # a link, which rglob does not follow in every Python


def name_of(path):
    return path.relative_to(PACKAGE).as_posix()


def unit_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """Dotted names of all imports of a file: `from a.b import c` is a.b.c."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: write the import in full, from megasora..."
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def units(path):
    """Units of megasora that a file imports, without names of the package itself, e.g. __version__."""
    parts = [name.split(".") for name in imports(path) if name.startswith("megasora.")]
    return {part[1] for part in parts if part[1] in LAYER_OF or (PACKAGE / part[1]).exists()} - {"__version__"}


each_file = pytest.mark.parametrize("path", FILES, ids=name_of)


def test_imports_in_functions_and_conditions_are_found(tmp_path):
    path = tmp_path / "source.py"
    path.write_text(
        "import a.b as c\nfrom d.e import f, g\n"
        "def late():\n    if True:\n        from h import i\n        import j\n"
        "class K:\n    def method(self):\n"
        "        try:\n            import l.m\n        except ImportError:\n            pass\n"
    )
    assert imports(path) == {"a.b", "d.e.f", "d.e.g", "h.i", "j", "l.m"}


def test_every_file_has_a_layer():
    assert {unit_of(p) for p in FILES} - {"__init__"} <= LAYER_OF.keys(), "add the new unit to LAYERS"
    assert len(FILES) > 30


@each_file
def test_a_file_imports_only_lower_layers(path):
    own = unit_of(path)
    if own == "__init__":
        assert not units(path)
        return
    for other in units(path) - {own}:
        assert LAYER_OF[other] < LAYER_OF[own], f"{name_of(path)} imports {other}, which is not in a lower layer"


@pytest.mark.parametrize("unit", sorted(INDEPENDENT))
def test_an_independent_unit_imports_only_base_layers(unit):
    imported = set().union(*(units(p) for p in FILES if unit_of(p) == unit))
    assert imported <= BASE | {unit}


def test_the_picture_of_the_layers_shows_every_unit_in_its_layer():
    """Boxes of a lower layer are further down; those of one layer have the same y."""
    picture = (ROOT / "docs" / "layers.svg").read_text(encoding="utf-8")
    labels = re.findall(r'<text [^>]*y="([\d.]+)"[^>]*class="mono bold[^>]*>([\w.]+)/?</text>', picture)
    drawn = {name.removesuffix(".py"): float(y) for y, name in labels}
    assert drawn.keys() == LAYER_OF.keys()
    heights = [{drawn[unit] for unit in layer} for layer in LAYERS]
    assert all(len(layer) == 1 for layer in heights)
    assert sorted(heights, key=max, reverse=True) == heights


def test_kernels_import_nothing_of_the_framework():
    for path in FILES:
        if unit_of(path) == "kernels":
            others = {name for name in imports(path) if not name.startswith("megasora.kernels")}
            outside = {name.split(".")[0] for name in others} - set(sys.stdlib_module_names)
            assert outside <= {"torch", "triton"}, name_of(path)


def test_only_one_file_imports_deepspeed():
    users = {name_of(p) for p in FILES if any(n.split(".")[0] == "deepspeed" for n in imports(p))}
    assert users == {"parallel/deepspeed_engine.py"}


def test_only_the_composition_root_imports_both_model_and_parallel():
    def knows_model(names):
        modules = {n for n in names if n.startswith("megasora.model.")}
        counts = {n for n in modules if n.startswith("megasora.model.flops.")}  # formulas, not modules
        return bool(modules - counts) or "megasora.build.build_model" in names

    both = {
        name_of(p)
        for p in FILES
        if knows_model(imports(p)) and any(n.startswith("megasora.parallel.") for n in imports(p))
    }
    assert both == {"parallelize.py"}


def test_only_the_composition_root_of_the_codec_divides_clips():
    """The network does not know of other processes, and the task gets its piece of a clip from parallelize_codec.py."""
    modules = ("halo", "clip_split", "clip_exchange")
    users = {
        name_of(p)
        for p in FILES
        if unit_of(p) != "parallel"
        and any(n.startswith(tuple(f"megasora.parallel.{module}." for module in modules)) for n in imports(p))
    }
    assert users == {"parallelize_codec.py"}


def test_no_file_is_named_utils_or_the_like():
    sources = [
        p for folder in ("megasora", "kernels", "tests", "tools", "benchmarks") for p in (ROOT / folder).rglob("*")
    ]
    names = ("util", "utils", "helper", "helpers", "common", "misc")
    assert not [str(p) for p in sources if p.stem in names]


def test_kernels_and_tests_are_no_packages():
    assert not list((ROOT / "kernels").rglob("__init__.py")) and not list((ROOT / "tests").rglob("__init__.py"))


def test_configuration_and_command_line_start_without_torch():
    code = (
        "import sys, megasora, megasora.cli, megasora.config; megasora.config.load(None, ['run.steps=3']); "
        "heavy = {'torch', 'deepspeed', 'webdataset', 'transformers', 'av', 'wandb', 'numpy'} & set(sys.modules); "
        "print(*sorted(heavy))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")


def test_the_training_loop_knows_no_model_and_no_task():
    allowed = {"config", "errors", "optim", "run_log", "training_state", "training_steps"}
    for file in ("trainer.py", "training_steps.py"):
        imported = {name for name in imports(PACKAGE / file) if name.startswith("megasora.")}
        others = {name for name in imported if name.split(".")[1] not in allowed}
        known = {"megasora.parallel.world", "megasora.tasks.task"}
        assert others and {name.rpartition(".")[0] for name in others} == known
        assert len((PACKAGE / file).read_text(encoding="utf-8").splitlines()) < 220
