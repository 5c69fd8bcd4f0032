"""The order of the house: what a file may import, read from its source; imports inside functions count too."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "megasora"

# Ground first. A unit (a file or a folder of megasora/) imports lower floors only; none on its own.
FLOORS = [
    {"errors"},
    {"config", "files", "stop", "placement"},
    {"batch", "kernels", "fragment"},
    {"model", "diffusion", "codec", "text", "data", "parallel", "optim", "checkpoint"},
    {"run_log", "testing", "build", "ingest"},
    {"parallelize", "sampling", "observe", "watchdog"},
    {"tasks", "checks", "preflight"},
    {"trainer"},
    {"train"},
    {"cli"},
]
GROUND = {unit for floor in FLOORS[:3] for unit in floor}
ROOMS = FLOORS[3]
FLOOR_OF = {unit: number for number, floor in enumerate(FLOORS) for unit in floor}
FILES = sorted(p for p in PACKAGE.rglob("*.py") if "kernels" not in p.relative_to(PACKAGE).parts)
FILES += sorted((PACKAGE / "kernels").glob("*.py"))  # a link, which rglob does not follow everywhere


def name_of(path):
    return path.relative_to(PACKAGE).as_posix()


def unit_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """Dotted names of everything a file imports: `from a.b import c` is a.b.c."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: write the import in full, from megasora..."
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def units(path):
    """Units of megasora that a file imports; the package's own names, as __version__, are no unit."""
    parts = [name.split(".") for name in imports(path) if name.startswith("megasora.")]
    return {part[1] for part in parts if part[1] in FLOOR_OF or (PACKAGE / part[1]).exists()} - {"__version__"}


each_file = pytest.mark.parametrize("path", FILES, ids=name_of)


def test_the_reader_of_imports_sees_late_and_conditional_ones(tmp_path):
    path = tmp_path / "source.py"
    path.write_text(
        "import a.b as c\nfrom d.e import f, g\n"
        "def late():\n    if True:\n        from h import i\n        import j\n"
        "class K:\n    def method(self):\n"
        "        try:\n            import l.m\n        except ImportError:\n            pass\n"
    )
    assert imports(path) == {"a.b", "d.e.f", "d.e.g", "h.i", "j", "l.m"}


def test_every_file_has_a_floor():
    assert {unit_of(p) for p in FILES} - {"__init__"} <= FLOOR_OF.keys(), "put the new unit into FLOORS"
    assert len(FILES) > 30


@each_file
def test_imports_only_go_down(path):
    own = unit_of(path)
    if own == "__init__":
        assert not units(path)
        return
    for other in units(path) - {own}:
        assert FLOOR_OF[other] < FLOOR_OF[own], f"{name_of(path)} imports {other}, which is not below it"


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_imports_the_ground_and_itself(room):
    found = set().union(*(units(p) for p in FILES if unit_of(p) == room))
    assert found <= GROUND | {room}


def test_kernels_import_nothing_of_the_framework():
    for path in FILES:
        if unit_of(path) == "kernels":
            others = {name for name in imports(path) if not name.startswith("megasora.kernels")}
            outside = {name.split(".")[0] for name in others} - set(sys.stdlib_module_names)
            assert outside <= {"torch", "triton"}, name_of(path)


def test_only_one_file_imports_deepspeed():
    users = {name_of(p) for p in FILES if any(n.split(".")[0] == "deepspeed" for n in imports(p))}
    assert users == {"parallel/zero.py"}


def test_only_the_seam_imports_both_the_model_and_its_spreading():
    def knows_model(names):
        modules = {n for n in names if n.startswith("megasora.model.")}
        counts = {n for n in modules if n.startswith("megasora.model.flops.")}  # closed forms, no module
        return bool(modules - counts) or "megasora.build.build_model" in names

    both = {
        name_of(p)
        for p in FILES
        if knows_model(imports(p)) and any(n.startswith("megasora.parallel.") for n in imports(p))
    }
    assert both == {"parallelize.py"}


def test_no_file_is_a_drawer_for_everything():
    sources = [
        p for folder in ("megasora", "kernels", "tests", "tools", "benchmarks") for p in (ROOT / folder).rglob("*")
    ]
    drawers = ("util", "utils", "helper", "helpers", "common", "misc")
    assert not [str(p) for p in sources if p.stem in drawers]


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
    allowed = {"checkpoint", "config", "errors", "optim", "run_log"}
    imported = {name for name in imports(PACKAGE / "trainer.py") if name.startswith("megasora.")}
    others = {name for name in imported if name.split(".")[1] not in allowed}
    assert others and {name.rpartition(".")[0] for name in others} == {"megasora.parallel.world", "megasora.tasks.task"}
    assert len((PACKAGE / "trainer.py").read_text(encoding="utf-8").splitlines()) < 200
