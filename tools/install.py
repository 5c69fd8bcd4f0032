"""`make install`: makes the virtual environment and installs MegaSora in it, editable, with its development tools.

Input: setup.py, constraints.txt and the interpreters of the machine. Output: a virtual environment, by default .venv.

A GPU machine often has a PyTorch that was built for its driver and must not be replaced. If an interpreter of the
machine has a PyTorch that sees a GPU, the environment is made on top of that interpreter, and PyTorch and its
requirements keep their versions; their names are written to kept.txt in the environment, so that a later call, perhaps
on a node without a GPU, keeps them too. All other versions come from constraints.txt. No compiler is needed.

Uses only the standard library and syntax that old versions of python3 accept, so that they report a readable error.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MIN_PYTHON = (3, 11)
CANDIDATES = (
    "python3.11",
    "python3",
    "python3.12",
    "python3.13",
)  # first: constraints.txt is tested with it

# Runs in each candidate. Prints one line: the version, and the requirements of a PyTorch that sees a GPU, with PyTorch
# and Triton. An activated virtual environment is skipped: another one cannot be made on top of it.
PROBE = """
import importlib.util, sys
names = []
if sys.version_info >= (3, 8) and sys.prefix == sys.base_prefix and importlib.util.find_spec("torch"):
    try:
        import importlib.metadata, torch
        if torch.cuda.is_available():
            names = ["torch", "triton"] + [r for r in importlib.metadata.requires("torch") or [] if "extra ==" not in r]
    except Exception as error:
        print("ignored the torch of", sys.executable + ":", error, file=sys.stderr)
print("%d.%d" % sys.version_info[:2], *[r.replace(" ", "") for r in names])
"""


def stop(message):
    sys.exit(f"install: {message}")


def distribution_name(requirement):
    """The normalized name in a requirement or constraint: `Foo_Bar>=1; ...` is `foo-bar`."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement.strip())
    return re.sub(r"[-_.]+", "-", name.group(0)).lower() if name else ""


def probe(interpreter):
    """((major, minor), names of PyTorch and its requirements, if it sees a GPU); None if the interpreter fails."""
    result = subprocess.run([interpreter, "-c", PROBE], stdout=subprocess.PIPE, text=True)
    if result.returncode != 0 or not result.stdout:
        return None
    version, *requirements = result.stdout.split("\n")[0].split(" ")
    return tuple(map(int, version.split("."))), {distribution_name(r) for r in requirements}


def choose_interpreter():
    """(path, names to keep): the first candidate whose PyTorch sees a GPU, else the first of at least MIN_PYTHON."""
    fallback, versions = None, []
    for path in filter(None, map(shutil.which, CANDIDATES)):
        result = probe(path)
        if result is None:
            continue
        version, kept_names = result
        versions.append("{} is {}.{}".format(path, *version))
        if version < MIN_PYTHON:
            continue
        if kept_names:
            return path, kept_names
        fallback = fallback or (path, kept_names)
    if fallback is None:
        found = ", ".join(versions) or "no python3 on PATH"
        stop(f"python >= 3.11 is needed ({found}); run: apt-get install python3.11 python3.11-venv")
    return fallback


def ensure_venv_module(interpreter):
    """Debian and Ubuntu package venv separately: installs it if this is root, else stops with the command."""
    check = [interpreter, "-c", "import ensurepip, venv"]
    if subprocess.run(check, stderr=subprocess.DEVNULL).returncode == 0:
        return
    version = subprocess.check_output([interpreter, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"])
    package = f"python{version.decode().strip()}-venv"
    if os.geteuid() == 0 and shutil.which("apt-get"):
        print(f"==> apt-get install {package}", flush=True)
        subprocess.run(["apt-get", "update", "-qq"], check=False)
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", package], env=quiet, check=False)
    if subprocess.run(check, stderr=subprocess.DEVNULL).returncode != 0:
        stop(f"{interpreter} has no venv module; run: sudo apt-get install {package}")


def make_environment(folder):
    """Makes the virtual environment; writes the names of packages that keep their versions to kept.txt."""
    interpreter, kept_names = choose_interpreter()
    print(f"==> {folder} on {interpreter}", flush=True)
    ensure_venv_module(interpreter)
    if kept_names:
        print("==> it has a PyTorch that sees a GPU, which is kept", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kept.txt").write_text("".join(f"{name}\n" for name in sorted(kept_names)), encoding="utf-8")
    options = ["--system-site-packages"] if kept_names else []
    subprocess.run([interpreter, "-m", "venv", *options, str(folder)], check=True)


def install(folder, extras, replaced=()):
    """pip install -e .[extras] with constraints.txt, without the kept packages and with the versions in `replaced`."""
    kept_file = folder / "kept.txt"
    kept_names = set(kept_file.read_text(encoding="utf-8").split()) if kept_file.exists() else set()
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    omitted = kept_names | {distribution_name(x) for x in replaced}
    lines = [*(x for x in lines if distribution_name(x) not in omitted), *replaced]
    constraints = folder / "constraints.txt"
    constraints.write_text("".join(f"{x}\n" for x in lines), encoding="utf-8")
    # DeepSpeed is a source archive; this also pins the environment in which pip builds its wheel.
    environment = {**os.environ, "PIP_BUILD_CONSTRAINT": str(ROOT / "constraints.txt")}
    environment["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--constraint", str(constraints)]
    tools = [name for name in ("pip", "setuptools", "wheel") if name not in kept_names]
    for arguments in (["--quiet", *tools], ["--editable", f"{ROOT}[{extras}]"]):
        if subprocess.run([*pip, *arguments], env=environment, cwd=ROOT).returncode != 0:
            stop("pip failed, see above; installed packages stay, and `make install` continues from there")


def write_torchrun(folder):
    """Writes a torchrun that starts the environment's interpreter: the machine's torchrun starts the machine's."""
    torchrun = folder / "bin" / "torchrun"
    if not torchrun.exists():
        torchrun.write_text(f'#!/bin/sh\nexec "{folder}/bin/python" -m torch.distributed.run "$@"\n', encoding="utf-8")
        torchrun.chmod(0o755)


def main():
    parser = argparse.ArgumentParser(description="Makes a virtual environment and installs MegaSora in it, editable.")
    parser.add_argument("--venv", default=str(ROOT / ".venv"), help="folder of the environment (default .venv)")
    parser.add_argument("--extras", default="dev", help="extras of setup.py, comma-separated (default dev)")
    parser.add_argument(
        "--replace",
        nargs="*",
        default=[],
        metavar="NAME==VERSION",
        help="versions in place of those of constraints.txt, e.g. torch==2.11.0 triton==3.6.0",
    )
    arguments = parser.parse_args()
    folder = Path(arguments.venv).absolute()

    if not (folder / "bin" / "pip").exists():
        make_environment(folder)
    install(folder, arguments.extras, arguments.replace)
    write_torchrun(folder)
    print(f"==> installed; `source {folder}/bin/activate`, then `megasora doctor`", flush=True)


if __name__ == "__main__":
    main()
