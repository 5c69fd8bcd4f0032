"""stop_and_resume.py RUN STEP CONFIG key=value ...: trains, stops by SIGTERM after STEP, resumes under torchrun."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    run, step, arguments = Path(sys.argv[1]), int(sys.argv[2]), [*sys.argv[3:], f"run.dir={sys.argv[1]}"]
    metrics = run / "metrics.jsonl"
    process = subprocess.Popen([sys.executable, "-m", "megasora.train", *arguments])
    while process.poll() is None and (not metrics.exists() or metrics.read_bytes().count(b"\n") < step):
        time.sleep(0.05)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    code = process.wait()
    steps = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    print(f"stopped with exit code {code} after {steps} steps", flush=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    return subprocess.call([*torchrun, "-m", "megasora.train", *arguments])


if __name__ == "__main__":
    sys.exit(main())
