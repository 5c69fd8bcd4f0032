"""Shards over the network: a server of static files on this machine, read by ranges through fsspec."""

import asyncio
import threading
from pathlib import Path

import pytest
import torch
from aiohttp import web

from megasora.config import DataConfig
from megasora.data.shard_writer import BlockWriter, write_manifest
from megasora.data.folder import open_folder
from megasora.data.loader import PackLoader
from megasora.data.mixture import open_mixture
from megasora.data.pack import Record
from megasora.data.shard_reader import ShardSplit
from megasora.data.tar import DamagedTar
from megasora.data.verify import verify

CLIPS = 12


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder, draw = tmp_path_factory.mktemp("served") / "shards", torch.Generator().manual_seed(0)
    with BlockWriter(folder, 0, 6000) as writer:
        for i in range(CLIPS):
            grid = (1 + i % 3, 2, 2)
            patches = torch.randn(4 * grid[0], 16, generator=draw)
            record = Record(i, patches, grid, torch.zeros(0), (16.0, 16.0, 4.0, 8.0), f"clip {i}")
            writer.add("train", record, {"source": f"{i}.mp4", "sha256": "0" * 64})
        writer.commit({}, {})
    write_manifest(folder, "noise", "bytes-16", [1, 1, 1], 1, {})
    return folder


@pytest.fixture(scope="module")
def url(shards):
    """The folder under an address of http, with ranges and a listing."""
    loop, asked, ready = asyncio.new_event_loop(), [], threading.Event()

    @web.middleware
    async def note(request, handler):
        asked.append((request.path, request.headers.get("Range")))
        return await handler(request)

    app = web.Application(middlewares=[note])
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
    yield f"http://127.0.0.1:{port}/{shards.name}", asked
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


def encode(caption):
    return torch.tensor([[len(caption)]])


def test_clips_are_the_same_over_http_and_only_their_own_bytes_are_read(url, shards):
    address, asked = url
    remote, local = ShardSplit.open(address, "train"), ShardSplit.open(shards, "train")
    assert len(remote) == CLIPS and len(remote.names) > 1
    asked.clear()
    for i in range(CLIPS):
        there, here = remote.read(i, encode), local.read(i, encode)
        assert torch.equal(there.patches_LP, here.patches_LP) and there.caption == here.caption == f"clip {i}"
    assert len(asked) == CLIPS and all(path.endswith(".tar") and part for path, part in asked)
    assert remote.read_meta(3) == local.read_meta(3)


def test_packs_are_the_same_over_http(url, shards):
    def read(address, threads):
        config = DataConfig(shards=str(address), tokens_per_pack=32, packs_per_step=2, reader_threads=threads)
        steps = iter(PackLoader(open_mixture(config, "train"), config, 0, encode, 100))
        found = [next(steps) for _ in range(6)]
        steps.close()
        return [pack for step in found for pack in step.packs]

    for there, here in zip(read(url[0], 2), read(shards, 0), strict=True):
        assert torch.equal(there.patches_LP, here.patches_LP) and torch.equal(there.sample_ids_G, here.sample_ids_G)


def test_damage_over_http_is_named_by_its_address(url, shards):
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
