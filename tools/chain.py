"""Submits ingest -> train -> sample to Slurm, each dependent on the success of the previous one; prints the job ids.

    python tools/chain.py --clips data/clips --shards data/shards --parts 16 --nodes 4 \\
        --prompts prompts.txt --samples runs/demo/samples  configs/demo.yaml run.dir=runs/demo

The configuration is checked before anything is submitted. Site settings come from SBATCH_PARTITION, SBATCH_ACCOUNT and
so on, as for every sbatch. If a job cannot be submitted, the jobs before it are cancelled.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from megasora.config import load
from megasora.errors import CONFIGURATION, CRASH, DONE, MegaSoraError, describe

SCRIPTS = Path("slurm")  # sbatch is run from the project's folder


def submit(dependency: str | None, *words: str) -> str:
    """Submits a job that starts after the job `dependency`; returns its id. Raises MegaSoraError."""
    command = ["sbatch", "--parsable", "--kill-on-invalid-dep=yes"]
    command += [f"--dependency=afterok:{dependency}"] if dependency else []
    try:
        done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise MegaSoraError("sbatch is not installed: run this where jobs are submitted") from None
    if done.returncode:
        raise MegaSoraError(f"{words[0]}: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]


def submit_chain(options: argparse.Namespace, overrides: list[str]) -> dict[str, str]:
    """Submits the jobs; returns {name: job id}. If one cannot be submitted, cancels the others and raises."""
    run = load(options.config, overrides).run.dir
    settings = [options.config, *overrides]
    array = f"--array=0-{options.parts - 1}"
    scripts = [
        ("ingest", [array, str(SCRIPTS / "ingest.sbatch"), options.clips, options.shards, "--config", *settings]),
        ("train", [f"--nodes={options.nodes}", str(SCRIPTS / "train.sbatch"), *settings]),
    ]
    if options.prompts:
        scripts.append(("sample", [array, str(SCRIPTS / "sample.sbatch"), run, options.prompts, options.samples]))
    jobs: dict[str, str] = {}
    for name, words in scripts:
        try:
            jobs[name] = submit(list(jobs.values())[-1] if jobs else None, *words)
        except MegaSoraError:
            if jobs:
                subprocess.run(["scancel", *jobs.values()], check=False)
            raise
    return jobs


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Submits ingest -> train -> sample to Slurm; prints the job ids.")
    parser.add_argument("--clips", required=True, help="what `megasora ingest` reads")
    parser.add_argument("--shards", required=True, help="folder of shards to write and to train on")
    parser.add_argument("--parts", type=int, default=1, help="tasks of the ingest and of the sampling")
    parser.add_argument("--nodes", type=int, default=1, help="nodes of the training")
    parser.add_argument("--prompts", help="text file, one prompt per line; without it nothing is sampled")
    parser.add_argument("--samples", help="folder of the samples")
    parser.add_argument("config", metavar="YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> None:
    if options.parts < 1 or options.nodes < 1:
        raise MegaSoraError(f"--parts {options.parts} and --nodes {options.nodes} must be at least 1")
    if bool(options.prompts) != bool(options.samples):
        raise MegaSoraError("give both --prompts and --samples, or neither")
    if not (SCRIPTS / "train.sbatch").is_file():
        raise MegaSoraError(f"no {SCRIPTS / 'train.sbatch'} here; run this in the project's folder")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        check(options)
        jobs = submit_chain(options, [*options.overrides, f"data.shards={options.shards}"])
    except MegaSoraError as error:
        print(f"chain: error: {describe(error)}", file=sys.stderr)
        return CONFIGURATION
    except OSError as error:
        print(f"chain: error: {describe(error)}", file=sys.stderr)
        return CRASH
    for name, job in jobs.items():
        print(name, job)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
