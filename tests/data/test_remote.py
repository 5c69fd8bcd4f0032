"""Remote shards: read by ranges through fsspec, from a local server of static files."""

import asyncio
import threading
from contextlib import contextmanager
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
from megasora.errors import DataError, MegaSoraError

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


@contextmanager
def serving(app: web.Application):
    """The http address of `app`, which a thread serves within the context."""
    runner, loop, ready = web.AppRunner(app), asyncio.new_event_loop(), threading.Event()

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
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


@pytest.fixture(scope="module")
def url(shards):
    """(the folder's http address, the requests so far), from a server with ranges and listings."""
    requests = []

    @web.middleware
    async def record_request(request, handler):
        requests.append((request.path, request.headers.get("Range")))
        return await handler(request)

    app = web.Application(middlewares=[record_request])
    app.router.add_static("/", shards.parent, show_index=True)
    with serving(app) as address:
        yield f"{address}/{shards.name}", requests


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


# ---------------------------------------------------------------- servers of other kinds


class Server:
    """Answers a request for `/MODE/NAME` as a server of that mode does; records requests as (method, mode, name)."""

    def __init__(self, folder: Path):
        self.folder, self.requests, self.failures = folder, [], {}

    async def handle(self, request: web.Request) -> web.StreamResponse:
        mode, name = request.match_info["mode"], request.match_info["name"]
        self.requests.append((request.method, mode, name))
        answer = getattr(self, mode)
        data = (self.folder / name).read_bytes() if (self.folder / name).is_file() else None
        if data is None and mode != "redirected":
            raise web.HTTPNotFound
        return await answer(request, name, data)

    async def ranges(self, request, name, data):
        """No list of the folder, no HEAD."""
        if request.method == "HEAD":
            raise web.HTTPMethodNotAllowed("HEAD", ["GET"])
        return web.FileResponse(self.folder / name)

    async def whole(self, request, name, data):
        """As python -m http.server: 200 and all bytes, whatever the range."""
        return web.Response(body=data)

    async def chunked(self, request, name, data):
        """As `whole`, without Content-Length."""
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        for start in range(0, len(data), 1000):
            await response.write(data[start : start + 1000])
        return response

    async def redirected(self, request, name, data):
        raise web.HTTPFound(f"/ranges/{name}")

    async def busy(self, request, name, data):
        """503, then 429, then a body that is cut; then all bytes that were asked for."""
        failure = self.failures[name] = self.failures.get(name, 0) + 1
        if failure == 1:
            raise web.HTTPServiceUnavailable
        if failure == 2:
            raise web.HTTPTooManyRequests
        if failure == 3:
            response = web.StreamResponse(headers={"Content-Length": str(len(data))})
            await response.prepare(request)
            await response.write(data[:10])
            request.transport.close()
            return response
        return web.FileResponse(self.folder / name)

    async def overloaded(self, request, name, data):
        raise web.HTTPBadGateway

    async def forbidden(self, request, name, data):
        raise web.HTTPForbidden

    async def teapot(self, request, name, data):
        raise web.HTTPNotAcceptable

    async def other_range(self, request, name, data):
        headers = {"Content-Range": f"bytes 7-{len(data) - 1}/{len(data)}"}
        if "Range" not in request.headers:
            return web.Response(body=data)
        return web.Response(status=206, body=data[7:], headers=headers)


@pytest.fixture(scope="module")
def server(shards):
    """(address, the Server)."""
    server = Server(shards)
    app = web.Application()
    app.router.add_route("*", "/{mode}/{name}", server.handle)
    with serving(app) as address:
        yield address, server


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr("megasora.data.http_folder.RETRY_SECONDS", (0.0, 0.01, 0.0))


@pytest.mark.parametrize("mode", ["ranges", "whole", "chunked", "redirected", "busy"])
def test_any_server_that_has_the_bytes_gives_the_same_clips(mode, server, shards, capfd):
    """Without a list of the folder and without HEAD; without ranges, a file is requested whole once per folder."""
    address, requests = server[0], server[1].requests
    requests.clear()
    remote, local = ShardSplit.open(f"{address}/{mode}", "train"), ShardSplit.open(shards, "train")
    for i in reversed(range(NUM_CLIPS)):
        assert torch.equal(remote.read(i, encode).patches_LP, local.read(i, encode).patches_LP)
    assert not list(verify(open_folder(f"{address}/{mode}")))
    assert {method for method, _, _ in requests} == {"GET"}
    without_ranges = mode in ("whole", "chunked")
    assert not without_ranges or sum(name == local.names[0] for _, _, name in requests) <= 6
    printed = capfd.readouterr().err.splitlines()
    shown = f"{address}/{mode}: the server does not support byte ranges; its files are read whole, which is slow"
    assert printed == ([shown] * 2 if without_ranges else [])  # two folders were opened


def test_large_files_of_a_server_without_ranges_are_an_error_that_says_so(server, monkeypatch):
    monkeypatch.setattr("megasora.data.http_folder.MAX_WHOLE_BYTES", 4000)
    for mode in ("whole", "chunked"):
        words = r"00\d.tar: the server does not support byte ranges, .* copy the shards"
        with pytest.raises(MegaSoraError, match=words) as error:
            ShardSplit.open(f"{server[0]}/{mode}", "train").read(0, encode)
        assert "damaged" not in str(error.value) and not isinstance(error.value, DataError)


def test_kept_files_stay_within_their_limit(server, shards, monkeypatch):
    tars = sorted(path.name for path in shards.glob("*.tar"))
    monkeypatch.setattr("megasora.data.http_folder.MAX_KEPT_BYTES", 1)
    folder = open_folder(f"{server[0]}/whole")
    for name in (*tars, tars[0]):
        assert folder.read_kept(name) == (shards / name).read_bytes() and list(folder.kept) == [name]


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("overloaded", "the server answers 502 Bad Gateway .4 tries."),
        ("forbidden", "the server answers 403 Forbidden"),
        ("teapot", "the server answers 406 Not Acceptable"),
    ],
)
def test_what_a_server_refuses_is_said_and_not_called_damage(mode, words, server):
    with pytest.raises(OSError, match=words) as error:
        ShardSplit.open(f"{server[0]}/{mode}", "train")
    assert "damaged" not in str(error.value) and f"/{mode}" in str(error.value)


def test_another_range_than_asked_for_is_said(server, shards):
    folder, (name, *_) = open_folder(f"{server[0]}/other_range"), sorted(path.name for path in shards.glob("*.tar"))
    with pytest.raises(OSError, match="another range than asked for"):
        folder.read_into(name, 0, [memoryview(bytearray(100))])


def test_a_server_that_is_not_there_is_an_error_after_a_few_tries():
    with pytest.raises(OSError, match=r"Cannot connect .*4 tries"):
        ShardSplit.open("http://127.0.0.1:9/shards", "train")


def test_a_file_that_the_server_does_not_have_is_missing(server, shards):
    with pytest.raises(MegaSoraError, match=f"no dataset.json in {server[0]}/ranges/no"):
        ShardSplit.open(f"{server[0]}/ranges/no", "train")
    name = sorted(path.name for path in shards.glob("*.tar"))[0]
    (shards / name).rename(shards / "away")
    try:
        with pytest.raises(DamagedTar, match=f"{name}: byte 0: the file is missing"):
            ShardSplit.open(f"{server[0]}/ranges", "train")
        with pytest.raises(DamagedTar, match=f"{name}: byte .*: the file is missing"):
            ShardSplit.open(f"{server[0]}/ranges", "train", strict=False).read(0, encode)
    finally:
        (shards / "away").rename(shards / name)


def test_bytes_beyond_the_end_are_none(server, shards):
    name = sorted(path.name for path in shards.glob("*.tar"))[0]
    size = (shards / name).stat().st_size
    for mode in ("ranges", "whole", "chunked"):
        folder, buffer = open_folder(f"{server[0]}/{mode}"), bytearray(100)
        assert folder.sizes([name, "no.tar"]) == {name: size}
        assert folder.read_into(name, size - 30, [memoryview(buffer)]) == 30
        assert folder.read_into(name, size + 5, [memoryview(buffer)]) == 0
        with folder.open(name) as file:
            assert file.seek(-10, 2) == size - 10 and file.read() == bytes(10)
