"""The wheel and sdist built from this tree, and the decisions of `make install`; from outside the tree, offline."""

from __future__ import annotations

import email
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = {".py", ".html", ".css", ".svg", ".md"}


def python(code_or_module: list[str], cwd: Path, **environment: str) -> str:
    """Standard output of this interpreter in a fresh process, which does not look into `cwd` for imports."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment}
    command = [sys.executable, "-P", *code_or_module]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def shipped_files(folder: Path) -> set[str]:
    """All files of megasora/ that a package must contain, with those of kernels/, which is a link."""
    package = folder / "megasora"
    paths = [*package.rglob("*"), *(package / "kernels").rglob("*")]  # rglob does not enter links
    return {str(path.relative_to(folder)) for path in paths if path.is_file() and path.suffix in SHIPPED}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the sources, so that building writes nothing into the tree."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("megasora", "kernels"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def built(source, tmp_path_factory) -> SimpleNamespace:
    """The sdist, and the wheel built from it, each unpacked or installed in its own folder."""
    out = tmp_path_factory.mktemp("built")
    python(["-m", "build", "--no-isolation", "--outdir", str(out / "dist"), str(source)], cwd=out)
    (wheel,), (sdist,) = (out / "dist").glob("*.whl"), (out / "dist").glob("*.tar.gz")
    python(["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(out / "wheel"), str(wheel)], cwd=out)
    shutil.unpack_archive(sdist, out / "sdist")
    (unpacked,) = (out / "sdist").iterdir()
    return SimpleNamespace(wheel=wheel, folders={"wheel": out / "wheel", "sdist": unpacked}, elsewhere=out)


def wheel_file(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = [path for path in archive.namelist() if path.endswith(f".dist-info/{name}")]
        return archive.read(path).decode()


def test_kernels_are_a_link_and_shadow_no_package():
    assert os.readlink(ROOT / "megasora" / "kernels") == "../kernels"
    assert not list(ROOT.glob("kernels/**/__init__.py"))
    assert not list(ROOT.glob("tests/**/__init__.py"))


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_package_contains_every_file_of_the_tree_and_no_other(built, source, kind):
    expected = shipped_files(source)
    assert any(name.startswith("megasora/kernels/") for name in expected)
    assert shipped_files(built.folders[kind]) == expected


def test_wheel_puts_only_megasora_at_the_top_level(built):
    with zipfile.ZipFile(built.wheel) as archive:
        top = {name.split("/")[0] for name in archive.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"megasora"}


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_package_and_its_kernels_import_from_another_folder(built, kind):
    """Checks the file of each module, since the editable install would be imported too."""
    folder = built.folders[kind]
    names = sorted(path.stem for path in (folder / "megasora" / "kernels").glob("*.py"))
    code = (
        "import importlib, json, sys\n"
        "modules = [importlib.import_module(name) for name in sys.argv[1:]]\n"
        "print(json.dumps([module.__file__ for module in modules]))\n"
    )
    modules = ["megasora", "megasora.errors", *(f"megasora.kernels.{name}" for name in names)]
    files = json.loads(python(["-c", code, *modules], cwd=built.elsewhere, PYTHONPATH=str(folder)).splitlines()[-1])
    assert len(names) > 0
    assert [file for file in files if not Path(file).is_relative_to(folder)] == []


def test_wheel_declares_the_command_and_the_license(built):
    assert "megasora = megasora.cli:main" in wheel_file(built.wheel, "entry_points.txt")
    metadata = email.message_from_string(wheel_file(built.wheel, "METADATA"))
    assert "Apache-2.0" in (metadata["License-Expression"], metadata["License"])
    assert metadata["Requires-Python"] == ">=3.11"
    assert "Apache License" in wheel_file(built.wheel, "licenses/LICENSE")


def test_constraints_pin_every_requirement(built):
    """All but flash-attn, which is built for the torch of its machine."""
    metadata = email.message_from_string(wheel_file(built.wheel, "METADATA"))
    required = {re.match(r"[\w.-]+", line).group(0) for line in metadata.get_all("Requires-Dist")}
    pinned = set(re.findall(r"^([\w.-]+)==[\w.]+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert required - pinned == {"flash-attn"}
    assert "torch==2.13.0\n" in (ROOT / "constraints.txt").read_text()


def test_version_has_one_source(source, tmp_path):
    """The version of the package is that of megasora/__init__.py, which is not imported to read it."""
    copy = tmp_path / "source"
    shutil.copytree(source, copy, symlinks=True, ignore=shutil.ignore_patterns("*.egg-info", "build"))
    init = copy / "megasora" / "__init__.py"
    changed = re.sub(r'^__version__ = ".*"', '__version__ = "9.8.7"', init.read_text(), flags=re.MULTILINE)
    init.write_text(changed + "\nraise RuntimeError('imported by setup.py')\n")
    assert python(["setup.py", "--quiet", "--version"], cwd=copy).split() == ["9.8.7"]


def test_import_is_light(tmp_path):
    """`import megasora` imports no other package; unlike its seconds, this does not depend on the machine."""
    code = (
        "import sys; before = set(sys.modules); import megasora, megasora.errors\n"
        "loaded = {name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
        "print(sorted(loaded), megasora.__version__)\n"
    )
    loaded, version = python(["-c", code], cwd=tmp_path, PYTHONPATH=str(ROOT)).rsplit(" ", 1)
    assert loaded == "['megasora']"
    assert re.fullmatch(r"\d+\.\d+\.\d+", version.strip())


# tools/install.py


@pytest.fixture
def install():
    spec = importlib.util.spec_from_file_location("install", ROOT / "tools" / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_interpreters(folder: Path, monkeypatch, **answers: str) -> None:
    """Programs that print a fixed line; PATH has no others."""
    for name, answer in answers.items():
        program = folder / name.replace("_", ".")
        program.write_text(f"#!/bin/sh\necho '{answer}'\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_python_3_11_is_chosen_if_no_torch_sees_a_gpu(install, tmp_path, monkeypatch):
    fake_interpreters(tmp_path, monkeypatch, python3="3.12", python3_11="3.11", python3_13="3.13")
    assert install.choose_interpreter() == (str(tmp_path / "python3.11"), set())


def test_an_interpreter_whose_torch_sees_a_gpu_is_chosen_and_its_requirements_kept(install, tmp_path, monkeypatch):
    answer = '3.12 torch triton setuptools<82 Typing_Extensions>=4.10 nvidia-nccl-cu13==2.28;sys_platform=="linux"'
    fake_interpreters(tmp_path, monkeypatch, python3_11="3.11", python3=answer)
    path, kept_names = install.choose_interpreter()
    assert path == str(tmp_path / "python3")
    assert kept_names == {"torch", "triton", "setuptools", "typing-extensions", "nvidia-nccl-cu13"}


def test_old_python_is_an_error_with_its_version_and_the_remedy(install, tmp_path, monkeypatch):
    fake_interpreters(tmp_path, monkeypatch, python3="3.9")
    with pytest.raises(SystemExit, match=r"python3 is 3\.9.*apt-get install python3\.11 python3\.11-venv"):
        install.choose_interpreter()


@pytest.mark.parametrize("sees_gpu", [True, False])
def test_probe_reports_torch_if_and_only_if_it_sees_a_gpu(install, tmp_path, monkeypatch, sees_gpu):
    (tmp_path / "torch.py").write_text(
        f"class cuda:\n    @staticmethod\n    def is_available():\n        return {sees_gpu}\n"
    )
    metadata = tmp_path / "torch-2.11.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torch\nVersion: 2.11.0\n"
        'Requires-Dist: setuptools<82\nRequires-Dist: optree>=0.13; extra == "optree"\n'
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    version, kept_names = install.probe(os.path.realpath(sys.executable))
    assert version == sys.version_info[:2]
    assert kept_names == ({"torch", "triton", "setuptools"} if sees_gpu else set())


def test_kept_packages_are_neither_constrained_nor_installed(install, tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(
        install.subprocess, "run", lambda command, **_: commands.append(command) or SimpleNamespace(returncode=0)
    )
    (tmp_path / "kept.txt").write_text("torch\ntriton\nsetuptools\n")
    install.install(tmp_path, "dev")
    all_lines = (ROOT / "constraints.txt").read_text().splitlines()
    left_out = set(all_lines) - set((tmp_path / "constraints.txt").read_text().splitlines())
    assert {line.split("==")[0] for line in left_out} == {"torch", "triton", "setuptools"}
    assert all(str(tmp_path / "constraints.txt") in command for command in commands)
    assert commands[0][-2:] == ["pip", "wheel"] and commands[1][-1] == f"{ROOT}[dev]"


def test_failing_pip_stops_the_installation(install, tmp_path, monkeypatch):
    monkeypatch.setattr(install.subprocess, "run", lambda command, **_: SimpleNamespace(returncode=1))
    with pytest.raises(SystemExit, match="make install"):
        install.install(tmp_path, "dev")
