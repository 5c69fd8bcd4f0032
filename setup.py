"""The package's metadata, all of it. pyproject.toml says only how to build and holds the settings of the tools."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    """The version in megasora/__init__.py, read and not imported: the build environment has none of our packages."""
    text = (ROOT / "megasora" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE).group(1)


ENCODERS = ["transformers", "diffusers", "accelerate", "sentencepiece"]  # pretrained text encoders and codecs

setup(
    name="megasora",
    version=read_version(),
    description="Pretraining of video diffusion transformers on packed spacetime patches",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # Namespace packages, because kernels/ has no __init__.py: with one, the PyPI package `kernels`, which transformers
    # imports, would be shadowed by the folder wherever Python runs from here. megasora/kernels is a link to kernels/.
    packages=find_namespace_packages(include=["megasora", "megasora.*"]),
    package_data={"": ["*.html", "*.css", "*.svg", "*.md"]},
    install_requires=[
        "torch>=2.6",
        "triton; sys_platform == 'linux'",
        "deepspeed",
        "webdataset",
        "fsspec",
        "omegaconf",
        "pyyaml",
        "safetensors",
        "blake3",
        "av",
        "numpy",
        "pillow",
        "rich",
        "matplotlib",
        "wandb",
        "zlib-ng",
        "cryptography",
    ],
    extras_require={
        "gpu": ["flash-attn"],
        "encoders": ENCODERS,
        "web": ["gradio"],
        "dev": [
            "aiohttp",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "build",
            "setuptools",
            "wheel",
            "transformers",
            "diffusers",
            "gradio",
        ],
    },
    entry_points={"console_scripts": ["megasora = megasora.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
