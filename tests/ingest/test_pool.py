"""Worker processes: the patches they write; a clip that crashes or blocks one is rejected and no other clip is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import is_running

from megasora.codec import build_codec, build_frame_encoder
from megasora.config import CodecConfig, IngestConfig
from megasora.data.clip_reader import read_clip
from megasora.data.clip_writer import write_image, write_video
from megasora.data.media import Media
from megasora.data.patches import frames_to_float, pad_frames, patchify
from megasora.errors import MegaSoraError
from megasora.ingest.pool import WorkerPool
from megasora.ingest.results import EncodedClip, Rejection
from megasora.ingest.worker import Worker, encode_job, worker_settings

SCORES = """
import os, signal, time
import numpy as np

def misbehave(frames_FHWC, fps):
    level = int(frames_FHWC[0, 0, 0, 0])
    if level == 10:
        os.kill(os.getpid(), signal.SIGSEGV)
    if level == 20:
        time.sleep(60)
    if level == 30:
        np.ones(1 << 33)
    if level == 40:
        print("this is not a result")
    if level == 50:
        os._exit(3)
    return level
"""


def noise(frames: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(frames).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("patch", [[1, 1, 1], [1, 2, 2]])
@pytest.mark.parametrize("size", [(5, 32, 48), (6, 30, 46)])
def test_a_worker_writes_the_patches_that_the_codec_gives_for_the_whole_clip(patch, size, tmp_path):
    write_video(noise(*size), 12, tmp_path / "a.mp4")
    config = CodecConfig(channels=24)
    result = Worker(build_frame_encoder(config), IngestConfig(), patch).run_job(
        encode_job(Media(tmp_path / "a.mp4"), tmp_path / "patches")
    )
    frames = frames_to_float(torch.from_numpy(read_clip(tmp_path / "a.mp4", IngestConfig()).frames_FHWC))
    frames = pad_frames(frames, (8 * patch[1], 8 * patch[2]))
    expected, grid = patchify(build_codec(config).encode(frames), tuple(patch))
    written = np.fromfile(tmp_path / "patches", "<f2").reshape(-1, result.patch_dim)
    assert tuple(result.grid) == grid and (result.height, result.width) == size[1:]
    assert (result.frames, result.fps) == (size[0], 12.0)
    assert written.shape == expected.shape
    torch.testing.assert_close(torch.from_numpy(written).float(), expected.half().float(), rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -65520.0])
def test_latents_that_are_not_finite_in_float16_reject_their_clip(value, tmp_path):
    write_image(np.full((16, 16, 3), 7, np.uint8), tmp_path / "a.png")
    worker = Worker(build_frame_encoder(CodecConfig()), IngestConfig(), [1, 1, 1])
    valid = worker.run_job(encode_job(Media(tmp_path / "a.png"), tmp_path / "patches"))
    encode = worker.encoder.encode

    def overflowing(frames):
        for latent in encode(frames):
            latent[1, 0, 3] = value
            yield latent

    worker.encoder.encode = overflowing
    rejection = worker.run_job(encode_job(Media(tmp_path / "a.png"), tmp_path / "patches"))
    assert (rejection.filter_name, rejection.reason) == ("codec", "not finite") and valid.grid == [1, 2, 2]
    for words in ("a.png: latent frame 1", "1 of 192 values are not finite in float16"):
        assert words in rejection.message


def stills(folder: Path, *levels: int) -> list[Path]:
    for number, level in enumerate(levels):
        write_image(np.full((16, 16, 3), level, np.uint8), folder / f"{number}.png")
    return [folder / f"{number}.png" for number in range(len(levels))]


REJECTION = Rejection("caption", "no caption", "a.mp4 has no caption")


def run(paths: list[Path | None], folder: Path, workers: int = 2, **limits) -> list[EncodedClip | Rejection]:
    """Results of the files `paths`, in order; a None comes with a REJECTION instead of a job."""
    settings = worker_settings(CodecConfig(), IngestConfig(**limits), [1, 1, 1])
    with WorkerPool(settings, workers) as pool:
        jobs = [(p, encode_job(Media(p), folder / f"{i}.f16") if p else REJECTION) for i, p in enumerate(paths)]
        results = list(pool.run(iter(jobs)))
    assert [path for path, _, _ in results] == paths
    return [result for _, result, _ in results]


@pytest.fixture
def scores(tmp_path, monkeypatch) -> list[str]:
    (tmp_path / "my_scores.py").write_text(SCORES)
    monkeypatch.syspath_prepend(tmp_path)
    return ["my_scores:misbehave"]


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_order_of_the_jobs(workers, scores, tmp_path):
    levels = [101 + i for i in range(12)]
    paths: list[Path | None] = [*stills(tmp_path, *levels)]
    paths.insert(5, None)
    results = run(paths, tmp_path, workers, scores=scores)
    assert results.pop(5) is REJECTION
    assert [result.quality["misbehave"] for result in results] == levels


def test_a_worker_that_crashes_hangs_or_exceeds_its_memory_rejects_only_its_clip(scores, tmp_path, capfd):
    levels = [0, 10, 1, 2, 20, 3, 30, 40, 50, 4, 10, 10, 5]
    results = run(stills(tmp_path, *levels), tmp_path, scores=scores, decode_timeout_seconds=1.5)
    reasons = [getattr(result, "reason", None) for result in results]
    crash, timeout, large = "crash", "timeout", "too large in memory"
    assert reasons == [None, crash, None, None, timeout, None, large, None, crash, None, crash, crash, None]
    assert "1.png" in results[1].message and "SIGSEGV" in results[1].message
    assert "ingest.decode_timeout_seconds=1.5" in results[4].message and "exit code 3" in results[8].message
    assert "ingest.worker_memory_mib=4096" in results[6].message
    assert {getattr(result, "filter_name", None) for result in results} == {None, "decode"}


def test_a_worker_that_cannot_start_is_an_error_and_rejects_no_clip(scores, tmp_path):
    paths = stills(tmp_path, 1)
    with pytest.raises(MegaSoraError, match="ingest.scores: my_scores:nothing"):
        run(paths, tmp_path, scores=["my_scores:nothing"])
    (tmp_path / "my_scores.py").write_text("import os; os._exit(7)")
    with pytest.raises(MegaSoraError, match="ended with exit code 7 before its first clip"):
        run(paths, tmp_path, scores=scores)


def test_a_full_disk_is_an_error_and_rejects_no_clip(tmp_path):
    with pytest.raises(MegaSoraError, match="No space left on device"):
        settings = worker_settings(CodecConfig(), IngestConfig(), [1, 1, 1])
        with WorkerPool(settings, 1) as pool:
            write_video(noise(9, 256, 256), 12, tmp_path / "a.mp4")
            list(pool.run(iter([("a", encode_job(Media(tmp_path / "a.mp4"), Path("/dev/full")))])))


def test_workers_die_with_their_parent(scores, tmp_path):
    stills(tmp_path, 20)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from megasora.config import CodecConfig, IngestConfig\n"
        "from megasora.data.media import Media\n"
        "from megasora.ingest.pool import WorkerPool\n"
        "from megasora.ingest.worker import encode_job, worker_settings\n"
        "folder = Path(sys.argv[1])\n"
        "limits = IngestConfig(scores=['my_scores:misbehave'])\n"
        "pool = WorkerPool(worker_settings(CodecConfig(), limits, [1, 1, 1]), 1)\n"
        "worker = pool.available_worker()\n"
        "print(worker.process.pid, flush=True)\n"
        "list(pool.run(iter([('0', encode_job(Media(folder / '0.png'), folder / 'patches'))])))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as parent:
        worker = int(parent.stdout.readline())
        deadline = time.monotonic() + 20
        while not (tmp_path / "patches").exists():  # the job is running
            assert time.monotonic() < deadline and parent.poll() is None
            time.sleep(0.02)
        os.kill(parent.pid, signal.SIGKILL)
    while is_running(worker):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_worker_does_not_import_torch(tmp_path):
    code = (
        "import sys, megasora.ingest.worker, megasora.codec; from megasora.config import CodecConfig; "
        "megasora.codec.build_frame_encoder(CodecConfig()); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "False\n"
