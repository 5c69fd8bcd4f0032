"""Remote shards: read by ranges through fsspec, from a local server of static files."""

import asyncio
import threading
from pathlib import Path

import pytest
import torch
from aiohttp import web

from megasora.config import DataConfig
from megasora.data.folder import open_folder
from megasora.data.loader import PackLoader
from megasora.data.manifest_writer import write_manifest
from megasora.data.mixture import open_mixture
from megasora.data.pack import Record
from megasora.data.shard_reader import ShardSplit
from megasora.data.shard_writer import BlockWriter
from megasora.data.tar import DamagedTar
from megasora.data.verify import verify

NUM_CLIPS = 12


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder, draw = tmp_path_factory.mktemp("served") / "shards", torch.Generator().manual_seed(0)
    with BlockWriter(folder, 0, 6000) as writer:
        for i in range(NUM_CLIPS):
            grid = (1 + i % 3, 2, 2)
            patches = torch.randn(4 * grid[0], 16, generator=draw)
            record = Record(i, patches, grid, torch.zeros(0), (16.0, 16.0, 4.0, 8.0), f"clip {i}")
            writer.add("train", record, {"source": f"{i}.mp4", "sha256": "0" * 64})
        writer.commit({}, {})
    write_manifest(folder, "noise", "bytes-16", [1, 1, 1], 1, {})
    return folder


@pytest.fixture(scope="module")
def url(shards):
    """(the folder's http address, the requests so far), from a server with ranges and listings."""
    loop, requests, ready = asyncio.new_event_loop(), [], threading.Event()

    @web.middleware
    async def record_request(request, handler):
        requests.append((request.path, request.headers.get("Range")))
        return await handler(request)

    app = web.Application(middlewares=[record_request])
    app.router.add_static("/", shards.parent, show_index=True)
    runner = web.AppRunner(app)

    def serve():
        asyncio.set_event_loop(loop)
        loop.run_until_complete(runner.setup())
        loop.run_until_complete(web.TCPSite(runner, "127.0.0.1", 0).start())
        ready.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert ready.wait(10)
    port = runner.addresses[0][1]
    yield f"http://127.0.0.1:{port}/{shards.name}", requests
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


def encode(caption):
    return torch.tensor([[len(caption)]])


def test_clips_are_the_same_over_http_and_only_their_own_bytes_are_read(url, shards):
    address, requests = url
    remote, local = ShardSplit.open(address, "train"), ShardSplit.open(shards, "train")
    assert len(remote) == NUM_CLIPS and len(remote.names) > 1
    requests.clear()
    for i in range(NUM_CLIPS):
        remote_clip, local_clip = remote.read(i, encode), local.read(i, encode)
        assert torch.equal(remote_clip.patches_LP, local_clip.patches_LP)
        assert remote_clip.caption == local_clip.caption == f"clip {i}"
    assert len(requests) == NUM_CLIPS and all(path.endswith(".tar") and part for path, part in requests)
    assert remote.read_meta(3) == local.read_meta(3)


def test_packs_are_the_same_over_http(url, shards):
    def read(address, threads):
        config = DataConfig(shards=str(address), tokens_per_pack=32, packs_per_step=2, reader_threads=threads)
        steps = iter(PackLoader(open_mixture(config, "train"), config, 0, encode, 100))
        found = [next(steps) for _ in range(6)]
        steps.close()
        return [pack for step in found for pack in step.packs]

    for a, b in zip(read(url[0], 2), read(shards, 0), strict=True):
        assert torch.equal(a.patches_LP, b.patches_LP) and torch.equal(a.sample_ids_G, b.sample_ids_G)


def test_an_error_over_http_names_the_address(url, shards):
    tar = sorted(shards.glob("*.tar"))[0]
    data = tar.read_bytes()
    try:
        tar.write_bytes(data[:700] + bytes([data[700] ^ 1]) + data[701:])
        with pytest.raises(DamagedTar, match=f"{url[0]}/{tar.name}: byte .* of sample 0 is damaged"):
            ShardSplit.open(url[0], "train").read(0, encode)
        assert [fault.sample_id for fault in verify(open_folder(url[0]))] == [0]
    finally:
        tar.write_bytes(data)
    assert not list(verify(open_folder(url[0])))
