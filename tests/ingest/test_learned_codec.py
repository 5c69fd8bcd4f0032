"""Ingest with a learned codec: the latents of the network for any division of the work, and what happens when a process
of it fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import is_running

from megasora.codec import build_codec, codec_fingerprint, resolve_codec
from megasora.codec.vae.weights import save_codec
from megasora.config import CodecConfig, Config, IngestConfig, VAEConfig, load
from megasora.data.clip_reader import read_clip
from megasora.data.clip_writer import write_image, write_video
from megasora.data.media import Media
from megasora.data.patches import frames_to_float, pad_frames, patchify
from megasora.data.shard_format import MANIFEST
from megasora.data.shard_reader import ShardSplit
from megasora.errors import MegaSoraError
from megasora.ingest import ingest, remote_encoder
from megasora.ingest.codec_messages import LAST, MORE, receive_frames, send_frames, send_latents
from megasora.ingest.codec_pool import CodecPool, codec_environments, gpus_of_this_process
from megasora.ingest.codec_process import CodecServer
from megasora.ingest.parts import Part
from megasora.ingest.pool import WorkerPool, WorkerProcess
from megasora.ingest.remote_encoder import CodecProcessEnded, RemoteEncoder
from megasora.ingest.worker import Worker, encode_job, worker_settings
from megasora.testing.codecs import SETTINGS, random_network, write_random_codec

FRAME_BYTES = 16 * 24 * 3


def noise(frames: int, seed: int = 0, size: tuple[int, int] = (16, 24)) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (frames, *size, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def codec_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_random_codec(folder / "codec")
    return folder


@pytest.fixture(scope="module")
def vae(codec_folder) -> CodecConfig:
    return resolve_codec(CodecConfig(name="vae", path=str(codec_folder)))


@pytest.fixture(scope="module")
def codec(vae):
    return build_codec(vae)


# ---------------------------------------------------------------- one worker and one codec process, in this process


@contextmanager
def connected(server: CodecServer) -> Iterator[RemoteEncoder]:
    """The encoder of a worker whose socket `server` serves, in a thread."""
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=server.serve, args=(theirs,), daemon=True)
    thread.start()
    with ours:
        yield RemoteEncoder(ours, [2, 4, 4], lambda waits: None)
    thread.join(60)
    assert not thread.is_alive()


@pytest.mark.parametrize("name", ["dct", "vae"])
@pytest.mark.parametrize("frames_per_message", [1, 3, 100])
@pytest.mark.parametrize("chunk_frames", [2, 16])
def test_a_codec_process_returns_the_bits_of_the_codec(name, frames_per_message, chunk_frames, vae, monkeypatch):
    monkeypatch.setattr(remote_encoder, "MESSAGE_BYTES", frames_per_message * FRAME_BYTES)
    config = CodecConfig(channels=8, factors=[2, 4, 4]) if name == "dct" else vae
    config.chunk_frames = chunk_frames
    codec = build_codec(config)
    with connected(CodecServer(codec)) as encoder:
        for frames in (noise(1), noise(9, seed=1), noise(4, seed=2)):
            expected = list(codec.encode_frames(iter(frames)))
            received = list(encoder.encode(iter(frames)))
            assert len(received) == len(expected) == codec.latent_frames(len(frames))
            assert all(np.array_equal(a, b) and a.dtype == np.float32 for a, b in zip(received, expected, strict=True))


def test_clips_that_are_encoded_at_the_same_time_have_the_latents_that_they_have_alone(codec, monkeypatch):
    """Three workers whose clips alternate, frame by frame, on a codec process that computes two clips at once."""
    monkeypatch.setattr(remote_encoder, "MESSAGE_BYTES", FRAME_BYTES)
    server, clips = CodecServer(codec), [noise(20 + k, seed=k) for k in range(3)]
    results: dict[int, list[np.ndarray]] = {}

    def run(k: int) -> None:
        with connected(server) as encoder:
            results[k] = list(encoder.encode(iter(clips[k])))

    threads = [threading.Thread(target=run, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for k, frames in enumerate(clips):
        assert np.array_equal(np.stack(results[k]), np.stack(list(codec.encode_frames(iter(frames)))))


@pytest.mark.parametrize("stop_at", [1, 2, 3, 7])
def test_after_a_clip_that_is_given_up_the_next_one_is_encoded_in_full(stop_at, codec, monkeypatch):
    monkeypatch.setattr(remote_encoder, "MESSAGE_BYTES", 2 * FRAME_BYTES)
    codec.config.chunk_frames = 2

    def damaged() -> Iterator[np.ndarray]:
        yield from noise(stop_at, seed=8)
        raise ValueError("damaged")

    expected = list(codec.encode_frames(iter(noise(5))))
    with connected(CodecServer(codec)) as encoder:
        with pytest.raises(ValueError, match="damaged"):
            list(encoder.encode(damaged()))
        assert np.array_equal(np.stack(list(encoder.encode(iter(noise(5))))), np.stack(expected))
        with closing(encoder.encode(iter(noise(9, seed=9)))) as latents:  # the consumer stops
            for _ in range(min(stop_at, 5)):
                next(latents)
        assert np.array_equal(np.stack(list(encoder.encode(iter(noise(5))))), np.stack(expected))


def test_a_worker_that_dies_within_its_clip_does_not_disturb_others(codec):
    server = CodecServer(codec)
    for kind, count in ((MORE, 3), (LAST, 3)):
        ours, theirs = socket.socketpair()
        send_frames(ours, kind, noise(count))
        ours.close()
        server.serve(theirs)  # returns, and gives back its turn and its slot
    with connected(server) as encoder:
        assert len(list(encoder.encode(iter(noise(3))))) == 2


def test_no_more_than_two_messages_are_decoded_ahead_of_the_network(monkeypatch):
    """One that the codec process has, and one that the worker has ready."""
    monkeypatch.setattr(remote_encoder, "MESSAGE_BYTES", 2 * FRAME_BYTES)
    taken = 0

    def counted() -> Iterator[np.ndarray]:
        nonlocal taken
        for frame in noise(40):
            taken += 1
            yield frame

    ours, theirs = socket.socketpair()
    waiting = threading.Event()
    encoder = RemoteEncoder(ours, [2, 4, 4], lambda waits: waits and waiting.set())
    thread = threading.Thread(target=lambda: list(encoder.encode(counted())), daemon=True)
    thread.start()
    for number in range(1, 21):
        message = receive_frames(theirs)
        assert len(message.frames) == 2 and waiting.wait(60)
        assert taken <= 2 * number + 3  # and the frame that did not fit into the message
        waiting.clear()
        send_latents(theirs, [])
    thread.join(60)
    assert taken == 40 and not thread.is_alive()


def fake_codec(encode_frames: Callable):
    return type("Fake", (), {"encode_frames": staticmethod(encode_frames)})()


FAILURES = [
    (
        RuntimeError("DefaultCPUAllocator: can't allocate memory: 5 bytes"),
        "more memory than there is.*ingest.codec_pro",
    ),
    (torch.OutOfMemoryError("CUDA out of memory"), "needs more memory than there is: CUDA.*lower codec.chunk_frames"),
    (MegaSoraError("frames of 1x1"), "^frames of 1x1$"),
    (ValueError("two\nlines"), "^the codec failed: ValueError: two lines$"),
]


@pytest.mark.parametrize(("error", "words"), FAILURES)
def test_an_error_of_the_network_is_the_error_of_its_clip(error, words, tmp_path):
    def failing(frames):
        next(iter(frames))
        raise error

    write_image(noise(1)[0], tmp_path / "a.png")
    with connected(CodecServer(fake_codec(failing))) as encoder, pytest.raises(MegaSoraError, match=words):
        list(encoder.encode(iter(noise(3))))
    with connected(CodecServer(fake_codec(failing))) as encoder, pytest.raises(MegaSoraError, match="a.png: "):
        Worker(encoder, IngestConfig(), [1, 1, 1]).run_job(encode_job(Media(tmp_path / "a.png"), tmp_path / "x"))


def test_a_network_that_never_answers_is_an_error():
    started, ended = threading.Event(), threading.Event()

    def hanging(frames):
        started.set()
        ended.wait(60)
        yield from ()

    server = CodecServer(fake_codec(hanging))
    control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours, connection = socket.socketpair()
    socket.send_fds(control, [b"s"], [connection.fileno()])
    connection.close()
    send_frames(ours, LAST, noise(1))
    try:
        with pytest.raises(MegaSoraError, match="took more than ingest.decode_timeout_seconds=0.05 for one chunk"):
            server.run(theirs, 0.05)
        assert started.is_set()
    finally:
        ended.set()
        ours.close()


def test_time_for_which_a_worker_waits_for_the_network_is_not_time_of_its_decoder(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    pool = WorkerPool(worker_settings(CodecConfig(), IngestConfig(decode_timeout_seconds=5), [1, 1, 1]), 1)
    worker = WorkerProcess(None, last_message_time=now, ready=True)
    assert pool.deadline(worker) == 105
    now = 103.0
    pool.handle_message(worker, {"waits": True})
    assert pool.deadline(worker) == float("inf")
    now = 1000.0
    pool.handle_message(worker, {"waits": False})
    assert pool.deadline(worker) == 1002  # 3 of the 5 seconds were used


# ---------------------------------------------------------------- processes


def settings(codec_folder: Path, *overrides: str) -> Config:
    sizes = ["ingest.workers=1", "ingest.clips_per_block=3"]
    return load(None, ["codec.name=vae", f"codec.path={codec_folder}", *sizes, *overrides])


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Nine clips in three blocks: an image, sides that are no whole latents, a damaged file, one of three chunks."""
    folder = tmp_path_factory.mktemp("source") / "clips"
    folder.mkdir()
    for number in range(9):
        frames = noise(33 if number == 6 else 1 + number, seed=number, size=(16 + 2 * number, 22))
        if number == 0:
            write_image(frames[0], folder / "0.png")
        elif number == 4:
            (folder / "4.mp4").write_text("no video\n" * 100)
        else:
            write_video(np.stack(frames), 12, folder / f"{number}.mp4")
        (folder / f"{number}.txt").write_text(f"clip {number}")
    return folder


@pytest.fixture(scope="module")
def reference(clips, codec_folder) -> Path:
    """The clips ingested by one worker and one codec process."""
    ingest(clips, clips.parent / "reference", settings(codec_folder))
    return clips.parent / "reference"


def test_shards_have_the_latents_of_the_codec_and_its_settings(reference, clips, codec, codec_folder):
    manifest = json.loads((reference / MANIFEST).read_text())
    assert manifest["codec_fingerprint"] == codec.fingerprint and manifest["patch_dim"] == 4
    assert manifest["codec_settings"]["path"] == str(codec_folder) and manifest["rejected"] == {"wrong suffix": 1}
    assert manifest["codec_settings"].keys() == {"name", "path", "factors", "channels", "tile", "tile_overlap"}
    shards = ShardSplit.open(reference, "train")
    assert shards.index.sample_ids.tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    for i in range(len(shards)):
        record = shards.read(i, lambda text: torch.zeros(1, 1))
        path = clips / f"{record.sample_id}.{'png' if record.sample_id == 0 else 'mp4'}"
        frames = pad_frames(frames_to_float(torch.from_numpy(read_clip(path, IngestConfig()).frames_FHWC)), (4, 4))
        expected, grid = patchify(codec.encode(frames), (1, 1, 1))
        assert record.grid == grid
        torch.testing.assert_close(record.patches_LP.float(), expected.half().float(), rtol=2e-3, atol=1e-4)


def test_any_number_of_workers_codec_processes_and_parts_writes_the_same_bytes(
    reference, clips, codec_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(codec_folder.parent)
    several = settings(Path(codec_folder.name), "ingest.workers=3", "ingest.codec_processes=2")
    for index in (1, 0):
        ingest(clips, tmp_path / "parts", several, Part(index, 2))
    assert contents(tmp_path / "parts") == contents(reference)


def test_an_ingest_is_resumed_with_the_same_codec_only(reference, clips, codec_folder, tmp_path):
    out = shutil.copytree(reference, tmp_path / "out")
    (out / "blocks" / "000001.json").unlink()
    stopped = contents(out)
    write_random_codec(tmp_path / "other", seed=1)
    with pytest.raises(MegaSoraError, match="codec: vae-2x4x4-4-[0-9a-f]{16}.* -> vae-2x4x4-4-"):
        ingest(clips, out, settings(tmp_path / "other"))
    assert contents(out) == stopped
    moved = shutil.copytree(codec_folder / "codec", tmp_path / "moved")
    ingest(clips, out, settings(moved))
    assert {n: d for n, d in contents(out).items() if n != MANIFEST} == {
        n: d for n, d in contents(reference).items() if n != MANIFEST
    }


WRONG = [
    ([], lambda folder: shutil.rmtree(folder), "codec.path=.* does not exist"),
    (["codec.channels=5"], lambda folder: None, "codec.channels=5, but the codec of codec.path=.* has 4"),
    (["codec.device=cuda"], lambda folder: None, "codec.device=cuda, but PyTorch sees no GPU"),
]


@pytest.mark.parametrize(("overrides", "damage", "words"), WRONG)
def test_a_codec_that_cannot_be_used_is_an_error_and_leaves_nothing(
    overrides, damage, words, clips, codec_folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    folder = shutil.copytree(codec_folder, tmp_path / "run")
    damage(folder)
    with pytest.raises(MegaSoraError, match=words):
        ingest(clips, tmp_path / "out", settings(folder, *overrides))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("key", "value"), [("fingerprint", "vae-other"), ("channels", 5), ("factors", [1, 4, 4])])
def test_a_codec_that_is_replaced_while_the_ingest_starts_is_an_error(key, value, vae):
    ready = {"fingerprint": "vae-a", "factors": [2, 4, 4], "channels": 4}
    codecs = CodecPool(vae, IngestConfig(), "vae-a", [])
    codecs.check_ready(ready)
    with pytest.raises(MegaSoraError, match=f"codec.path=.* was changed while this ingest started: {key} .* -> "):
        codecs.check_ready({**ready, key: value})


def test_latents_that_are_not_finite_reject_their_clip(codec, tmp_path, monkeypatch):
    """The first channel is divided by so little that only latents of exactly zero would fit into float16."""
    write_video(np.stack(noise(7)), 12, tmp_path / "a.mp4")
    monkeypatch.setattr(remote_encoder, "MESSAGE_BYTES", 2 * FRAME_BYTES)
    folder, state = tmp_path / "codec", random_network().state_dict()
    save_codec(folder, VAEConfig(**SETTINGS), [2, 4, 4], 4, state, [0.0] * 4, [1e-9] * 4, 1, None)
    huge = build_codec(resolve_codec(CodecConfig(name="vae", path=str(folder), chunk_frames=2)))
    for used, reason in ((huge, "not finite"), (codec, None)):
        with connected(CodecServer(used)) as encoder:
            worker = Worker(encoder, IngestConfig(), [1, 1, 1])
            for _ in range(2):
                result = worker.run_job(encode_job(Media(tmp_path / "a.mp4"), tmp_path / "patches"))
                assert getattr(result, "reason", None) == reason
    assert result.grid == [4, 4, 6]


SCORES = """
import os, signal

def crash_on_black(frames_FHWC, fps):
    if not frames_FHWC.any():
        os.kill(os.getpid(), signal.SIGSEGV)
    return 1.0
"""


def test_a_killed_worker_costs_its_clip_and_a_killed_codec_process_ends_the_ingest(vae, tmp_path, monkeypatch):
    (tmp_path / "my_scores.py").write_text(SCORES)
    monkeypatch.syspath_prepend(tmp_path)
    jobs = []
    for number in range(6):
        path = tmp_path / f"{number}.png"
        write_image(np.full((16, 16, 3), 40 * (number % 3), np.uint8), path)
        jobs.append((path, encode_job(Media(path), path.with_suffix(".f16"))))
    limits = IngestConfig(scores=["my_scores:crash_on_black"])
    with (
        CodecPool(vae, limits, codec_fingerprint(vae), [{}, {}]) as codecs,
        WorkerPool(worker_settings(vae, limits, [1, 1, 1]), 2, codecs) as pool,
    ):
        results = [result for _, result, _ in pool.run(iter(jobs))]
        assert [getattr(result, "reason", None) for result in results] == ["crash", None, None] * 2
        assert sorted(worker.codec_index for worker in pool.workers) == [0, 1]

        def killing() -> Iterator:
            yield from jobs[1:3]
            os.kill(codecs.processes[1].process.pid, signal.SIGKILL)
            yield from (jobs[k] for k in (4, 5, 1, 2, 4, 5))

        with pytest.raises(MegaSoraError, match="a codec process ended with SIGKILL; if memory ran out, lower ingest"):
            list(pool.run(killing()))
    assert codecs.processes == []


def test_a_worker_that_finds_its_codec_process_gone_says_so(tmp_path):
    write_image(noise(1)[0], tmp_path / "a.png")
    ours, theirs = socket.socketpair()
    theirs.close()
    worker = Worker(RemoteEncoder(ours, [2, 4, 4], lambda waits: None), IngestConfig(), [1, 1, 1])
    with pytest.raises(CodecProcessEnded):
        worker.run_job(encode_job(Media(tmp_path / "a.png"), tmp_path / "x"))
    ours.close()


def test_codec_processes_die_with_their_parent(vae):
    code = (
        "import json, sys, time\n"
        "from megasora.config import CodecConfig, IngestConfig\n"
        "from megasora.codec import codec_fingerprint\n"
        "from megasora.ingest.codec_pool import CodecPool\n"
        "config = CodecConfig(**json.loads(sys.argv[1]))\n"
        "with CodecPool(config, IngestConfig(), codec_fingerprint(config), [{}]) as codecs:\n"
        "    print(codecs.processes[0].process.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    values = json.dumps(vars(vae))
    with subprocess.Popen([sys.executable, "-c", code, values], stdout=subprocess.PIPE, text=True) as parent:
        codec_process = int(parent.stdout.readline())
        assert is_running(codec_process)
        parent.kill()
    deadline = time.monotonic() + 20
    while is_running(codec_process):
        assert time.monotonic() < deadline
        time.sleep(0.02)


GPUS = [
    ({}, ["0", "1", "2", "3"]),
    ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, ["1", "3"]),
    ({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}, ["3"]),
    ({"LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "8"}, ["1"]),
]


@pytest.mark.parametrize(("variables", "expected"), GPUS)
def test_the_processes_of_a_machine_divide_its_gpus(variables, expected):
    assert gpus_of_this_process(["0", "1", "2", "3"], variables) == expected


def test_codec_processes_are_one_per_gpu_else_one_per_core(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-8a,7")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    config, limits = CodecConfig(), IngestConfig()
    named = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in ("4", "GPU-8a", "7")]
    assert codec_environments(config, limits, 16) == named
    assert codec_environments(config, IngestConfig(codec_processes=4), 16) == [*named, named[0]]
    assert codec_environments(CodecConfig(device="cpu"), limits, 2) == [{}, {}]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert codec_environments(config, limits, 3) == [{}] * 3
    assert codec_environments(config, IngestConfig(codec_processes=1), 3) == [{}]
