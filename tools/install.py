"""Make the virtual environment and install MegaSora in it, editable, with its development tools: `make install`.

In: setup.py, constraints.txt and the interpreters of the machine. Out: a virtual environment, by default .venv.

Why a script: PyTorch for the GPU of a machine is often installed already, built for its driver, and must not be
replaced by another build. Where an interpreter of the machine has a PyTorch that sees a GPU, the environment is made
on top of that interpreter, and the versions of PyTorch and of what it requires are kept as they are; their names are
noted in kept.txt in the environment, so that a later run, perhaps on a node without a GPU, keeps them too. Everywhere
else every version comes from constraints.txt. Nothing here needs a compiler.

Only the standard library, and syntax that an old python3 reads as well, so that it can say what is wrong.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 11)
CANDIDATES = ("python3.11", "python3", "python3.12", "python3.13")  # first: the one the constraints were tested with

# Run in each candidate. One line: the version, and what a PyTorch that sees a GPU requires, itself and Triton included.
# An activated virtual environment is left out: another one cannot be made on top of it.
PROBE = """
import importlib.util, sys
found = []
if sys.version_info >= (3, 8) and sys.prefix == sys.base_prefix and importlib.util.find_spec("torch"):
    try:
        import importlib.metadata, torch
        if torch.cuda.is_available():
            found = ["torch", "triton"] + [r for r in importlib.metadata.requires("torch") or [] if "extra ==" not in r]
    except Exception as error:
        print("ignored the torch of", sys.executable + ":", error, file=sys.stderr)
print("%d.%d" % sys.version_info[:2], *[r.replace(" ", "") for r in found])
"""


def stop(message):
    sys.exit(f"install: {message}")


def distribution_name(requirement):
    """The normalized name in a requirement or constraint: `Foo_Bar>=1; ...` is `foo-bar`."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement.strip())
    return re.sub(r"[-_.]+", "-", name.group(0)).lower() if name else ""


def probe(interpreter):
    """((major, minor), names that its PyTorch for the GPU brings) of an interpreter; None where it does not run."""
    result = subprocess.run([interpreter, "-c", PROBE], stdout=subprocess.PIPE, text=True)
    if result.returncode != 0 or not result.stdout:
        return None
    version, *requirements = result.stdout.split("\n")[0].split(" ")
    return tuple(map(int, version.split("."))), {distribution_name(r) for r in requirements}


def choose_interpreter():
    """(path, names to keep): the first candidate whose PyTorch sees a GPU, or else the first that is new enough."""
    chosen, seen = None, []
    for path in filter(None, map(shutil.which, CANDIDATES)):
        found = probe(path)
        if found is None:
            continue
        version, kept = found
        seen.append("{} is {}.{}".format(path, *version))
        if version < OLDEST_PYTHON:
            continue
        if kept:
            return path, kept
        chosen = chosen or (path, kept)
    if chosen is None:
        found = ", ".join(seen) or "no python3 on PATH"
        stop(f"python >= 3.11 is needed ({found}); run: apt-get install python3.11 python3.11-venv")
    return chosen


def ensure_venv_module(interpreter):
    """Debian and Ubuntu keep Python's venv in a package of its own; root gets it installed, others are told how."""
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
    """Make the virtual environment, and note in kept.txt what stays as the machine has it."""
    interpreter, kept = choose_interpreter()
    print(f"==> {folder} on {interpreter}", flush=True)
    ensure_venv_module(interpreter)
    if kept:
        print("==> it has a PyTorch that sees a GPU, which is kept", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kept.txt").write_text("".join(f"{name}\n" for name in sorted(kept)), encoding="utf-8")
    options = ["--system-site-packages"] if kept else []
    subprocess.run([interpreter, "-m", "venv", *options, str(folder)], check=True)


def install(folder, extras, replaced=()):
    """pip install -e .[extras] under constraints.txt: without the packages that are kept, with `replaced` versions."""
    noted = folder / "kept.txt"
    kept = set(noted.read_text(encoding="utf-8").split()) if noted.exists() else set()
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    omitted = kept | {distribution_name(x) for x in replaced}
    lines = [*(x for x in lines if distribution_name(x) not in omitted), *replaced]
    constraints = folder / "constraints.txt"
    constraints.write_text("".join(f"{x}\n" for x in lines), encoding="utf-8")
    # DeepSpeed comes as a source archive; its wheel is built in an environment of pip's own, which this pins too.
    environment = {**os.environ, "PIP_BUILD_CONSTRAINT": str(ROOT / "constraints.txt")}
    environment["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--constraint", str(constraints)]
    tools = [name for name in ("pip", "setuptools", "wheel") if name not in kept]
    for arguments in (["--quiet", *tools], ["--editable", f"{ROOT}[{extras}]"]):
        if subprocess.run([*pip, *arguments], env=environment, cwd=ROOT).returncode != 0:
            stop("pip failed, see above; what is installed so far is kept, and `make install` goes on from there")


def write_torchrun(folder):
    """The torchrun of the machine starts the machine's interpreter; this one starts the environment's."""
    torchrun = folder / "bin" / "torchrun"
    if not torchrun.exists():
        torchrun.write_text(f'#!/bin/sh\nexec "{folder}/bin/python" -m torch.distributed.run "$@"\n', encoding="utf-8")
        torchrun.chmod(0o755)


def main():
    parser = argparse.ArgumentParser(description="Make a virtual environment and install MegaSora in it, editable.")
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
