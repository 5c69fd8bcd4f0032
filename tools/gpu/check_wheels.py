"""check_wheels.py FOLDER PYTHON_VERSION LIMIT_MIB PACKAGE...: checks a folder of wheels for another machine.

Every wheel fits that Python on Linux x86-64, each package is there once, requirements are in the folder or among the
packages that the machine has, and the working tree with the wheels is at most LIMIT_MIB large.
"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(wheel: Path) -> list[tuple[str, str]]:
    """(normalized name, version specifier) of each unconditional requirement of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    result = []
    for line in lines:
        match = re.match(r"Requires-Dist: ([A-Za-z0-9._-]+)([^;]*)(;.*)?$", line)
        if match and not re.search("extra|platform_python_implementation", match[3] or ""):
            result.append((normalized(match[1]), match[2].strip()))
    return result


def check(folder: Path, version: str, limit_mib: float, present: set[str]) -> list[str]:
    """Messages, one per problem."""
    tag, problems = "cp" + version.replace(".", ""), []
    wheels: dict[str, Path] = {}
    for path in sorted(folder.glob("*.whl")):
        name, _, *_, python, abi, platform = path.stem.split("-")
        if normalized(name) in wheels:
            problems.append(f"two wheels of {name}")
        wheels[normalized(name)] = path
        fits = "py3" in python.split(".") or tag in python.split(".") or (abi == "abi3" and python.startswith("cp3"))
        if not fits or not re.search(r"^any$|manylinux.*x86_64", platform):
            problems.append(f"{path.name} is not for {tag} on Linux x86-64")
    for name, path in wheels.items():
        for required, specifier in requirements(path):
            if required not in wheels and required not in present:
                problems.append(f"{name} requires {required}{specifier}, which neither {folder} nor the machine has")
    size = sum(path.lstat().st_size for path in {*tracked_files(), *folder.iterdir()}) / 2**20
    for path in sorted(folder.iterdir()):
        print(f"{path.stat().st_size / 2**20:7.2f} MiB  {path.name}")
    print(f"{size:7.2f} MiB  with the working tree; limit {limit_mib:g}")
    if size > limit_mib:
        problems.append(f"{size:.1f} MiB with the working tree exceed the limit of {limit_mib:g} MiB")
    return problems


def tracked_files() -> set[Path]:
    """Files of the working tree that git tracks or would add."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    names = subprocess.run(command, capture_output=True, check=True).stdout.split(b"\0")
    return {path for path in (Path(name.decode()) for name in names if name) if path.is_symlink() or path.exists()}


if __name__ == "__main__":
    problems = check(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), {normalized(name) for name in sys.argv[4:]})
    sys.exit("\n".join(f"prepare: {problem}" for problem in problems) if problems else 0)
