"""The version of the code that a process runs: a hash of its sources, and the versions of the packages it uses."""

from __future__ import annotations

import functools
import hashlib
import platform
from pathlib import Path

PACKAGES = ("torch", "triton", "deepspeed")
DIGITS = 12


@functools.cache
def source_hash() -> str:
    """Hash of the Python files of the package and of its kernels. They are read once."""
    digest, root = hashlib.sha256(), Path(__file__).parents[1]
    files = {*root.rglob("*.py"), *(root / "kernels").glob("*.py")}  # kernels is a link, which rglob may not follow
    for path in sorted(files):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:DIGITS]


def code_versions() -> dict[str, str]:
    """What ranks must have in common to train the same model: Python, packages, MegaSora's sources; name -> version."""
    import importlib.metadata

    versions = {"python": platform.python_version(), "megasora": source_hash()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "missing"
    return versions
