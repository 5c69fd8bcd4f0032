"""A folder of shards on a web server, read by byte ranges.

    sizes --one request of one byte per file--> bytes of each file; the server need not list folders, nor answer HEAD
    read_into --Range: bytes=START-END--> 206: the bytes asked for; 200: the server has no ranges

Without ranges, files of up to MAX_WHOLE_BYTES are read whole and some are kept; larger ones are an error. Requests that
fail for now (connections, 429, 5xx) are repeated. What a server says is an OSError: 404 FileNotFoundError, 401 and 403
PermissionError. Only wrong bytes are damage, which the checksums of the reader show.
"""

from __future__ import annotations

import asyncio
import errno
import io
import re
import sys
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, BinaryIO, TypeVar

from megasora.data.reader_lock import ReaderLock
from megasora.errors import MegaSoraError

Value = TypeVar("Value")

MAX_WHOLE_BYTES = 64 << 20  # of a file that is read whole from a server without ranges
MAX_KEPT_BYTES = 256 << 20  # of such files, kept in memory
MAX_REQUESTS = 64  # at a time
RETRY_SECONDS = (0.5, 1.0, 2.0, 4.0)  # waited before each further try
TEMPORARY = (408, 425, 429, 500, 502, 503, 504)
MISSING, FORBIDDEN = (404, 410), (401, 403)
OK, PARTIAL, BEYOND_END = 200, 206, 416
NO_RANGES = "the server does not support byte ranges"
REMEDY = "copy the shards to a disk, or serve them by one that does, such as nginx or an object store"


class TemporaryError(Exception):
    """A status that a further try may not have."""


class RangesIgnored(Exception):
    """The server answered a request for a range with the whole file."""


class HttpFolder:
    """A folder of a web server. Same methods as LocalFolder."""

    def __init__(self, url: str, reader_lock: ReaderLock | None = None):
        import fsspec

        self.url, self.reader_lock = url.rstrip("/"), reader_lock or ReaderLock()
        try:
            self.system = fsspec.filesystem(url.partition(":")[0].lower())
        except (ValueError, ImportError) as error:
            raise MegaSoraError(f"{url} cannot be opened: {error}") from None
        self.has_ranges = True
        self.kept: OrderedDict[str, bytes] = OrderedDict()  # whole files, the last used one last
        self.kept_lock = threading.Lock()

    def __reduce__(self):
        return HttpFolder, (self.url,)

    def __str__(self) -> str:
        return self.url

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        """Name -> bytes of those of the files that exist."""
        sizes = self.run_all([lambda name=name: self.probe_size(name) for name in names])
        found = {name: size for name, size in zip(names, sizes, strict=True) if size is not None}
        return {name: len(self.read_kept(name)) if size < 0 else size for name, size in found.items()}

    def read_into(self, name: str, offset: int, buffers: Sequence[memoryview]) -> int:
        """Fills byte buffers one after the other from byte `offset` of a file on; returns the number of bytes read."""
        end = offset + sum(len(buffer) for buffer in buffers)
        with self.reader_lock.released():
            data, done = memoryview(self.read_range(name, offset, end)), 0
        for buffer in buffers:
            part = data[done : done + len(buffer)]
            buffer[: len(part)] = part
            done += len(part)
        return done

    def read_whole(self, names: Sequence[str]) -> list[bytes]:
        """The contents of several files."""
        return self.run_all([lambda name=name: self.get_whole(name, None) for name in names])

    def open(self, name: str) -> BinaryIO:
        """A file, read ahead in blocks."""
        return io.BufferedReader(RangeReader(self, name), 4 << 20)

    # ------------------------------------------------------------ with and without ranges

    def read_range(self, name: str, start: int, end: int) -> bytes:
        if self.has_ranges:
            try:
                return self.run_all([lambda: self.get_range(name, start, end)])[0]
            except RangesIgnored:
                self.has_ranges = False
                print(f"{self.url}: {NO_RANGES}; its files are read whole, which is slow", file=sys.stderr, flush=True)
        return self.read_kept(name)[start:end]

    def read_kept(self, name: str) -> bytes:
        """The contents of a file that is small enough to be read whole. Raises MegaSoraError for another."""
        with self.kept_lock:
            if name not in self.kept:
                self.kept[name] = self.run_all([lambda: self.get_whole(name, MAX_WHOLE_BYTES)])[0]
            self.kept.move_to_end(name)
            while len(self.kept) > 1 and sum(map(len, self.kept.values())) > MAX_KEPT_BYTES:
                self.kept.popitem(last=False)
            return self.kept[name]

    # ------------------------------------------------------------ requests, in the event loop of fsspec

    def run_all(self, requests: list[Callable[[], Awaitable[Value]]]) -> list[Value]:
        """The results of several requests, each of which is tried several times."""
        from fsspec.asyn import sync

        async def run() -> list[Value]:
            slots = asyncio.Semaphore(MAX_REQUESTS)

            async def run_one(request: Callable[[], Awaitable[Value]]) -> Value:
                async with slots:
                    return await self.retry(request)

            return await asyncio.gather(*map(run_one, requests))

        return sync(self.system.loop, run)

    async def retry(self, request: Callable[[], Awaitable[Value]]) -> Value:
        """The result of a request. Raises OSError if it still fails at the last of `RETRY_SECONDS`."""
        import aiohttp

        for seconds in (*RETRY_SECONDS, None):
            try:
                return await request()
            except (TemporaryError, aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, TimeoutError) as error:
                if seconds is None:
                    tries = len(RETRY_SECONDS) + 1
                    problem = f"{str(error) or type(error).__name__} ({tries} tries)"
                    raise OSError(errno.EIO, problem, self.url) from None
            except aiohttp.ClientError as error:
                raise OSError(errno.EIO, str(error) or type(error).__name__, self.url) from None
            await asyncio.sleep(seconds)

    async def get(self, name: str, headers: dict[str, str]):
        """The response to a request, as a context; redirections are followed."""
        session = await self.system.set_session()
        url = self.system.encode_url(f"{self.url}/{name}")
        return session.get(url, headers={"Accept-Encoding": "identity", **headers})

    async def probe_size(self, name: str) -> int | None:
        """The bytes of a file; None if there is no such file, -1 if the server does not say."""
        async with await self.get(name, {"Range": "bytes=0-0"}) as response:
            if response.status in MISSING:
                return None
            self.check_status(response, name, BEYOND_END)
            if response.status in (PARTIAL, BEYOND_END):
                total = re.search(r"/(\d{1,18})$", response.headers.get("Content-Range", ""))
                return int(total[1]) if total else -1
            encoded = response.headers.get("Content-Encoding", "identity") != "identity"
            return -1 if encoded or response.content_length is None else response.content_length

    async def get_range(self, name: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file, fewer at its end. Raises RangesIgnored."""
        async with await self.get(name, {"Range": f"bytes={start}-{end - 1}"}) as response:
            self.check_status(response, name, BEYOND_END)
            if response.status == BEYOND_END:
                return b""
            if response.status != PARTIAL:
                raise RangesIgnored
            first = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
            if not first or int(first[1]) != start:
                raise OSError(errno.EIO, "the server answers with another range than asked for", f"{self.url}/{name}")
            return (await response.read())[: end - start]

    async def get_whole(self, name: str, limit: int | None) -> bytes:
        """A whole file. Raises MegaSoraError if it has more than `limit` bytes."""
        async with await self.get(name, {}) as response:
            self.check_status(response, name)
            data, size = bytearray(), response.content_length or 0
            while limit is None or max(size, len(data)) <= limit:
                chunk = await response.content.readany()
                if not chunk:
                    return bytes(data)
                data += chunk
        problem = f"{NO_RANGES}, and the file has more than the {limit >> 20} MiB that are read whole"
        raise MegaSoraError(f"{self.url}/{name}: {problem}; {REMEDY}")

    def check_status(self, response: Any, name: str, *allowed: int) -> None:
        """Raises OSError, or TemporaryError, unless the status is 200, 206 or one of `allowed`."""
        status, url = response.status, f"{self.url}/{name}"
        if status in (OK, PARTIAL, *allowed):
            return
        answer = f"the server answers {status} {response.reason}"
        if status in TEMPORARY:
            raise TemporaryError(answer)
        if status in MISSING:
            raise FileNotFoundError(errno.ENOENT, answer, url)
        if status in FORBIDDEN:
            raise PermissionError(errno.EACCES, answer, url)
        raise OSError(errno.EIO, answer, url)


class RangeReader(io.RawIOBase):
    """A file of an HttpFolder."""

    def __init__(self, folder: HttpFolder, name: str):
        self.folder, self.name, self.position = folder, name, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        size = self.folder.sizes([self.name]).get(self.name, 0) if whence == io.SEEK_END else 0
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: size}[whence]
        return self.position

    def readinto(self, buffer) -> int:
        count = self.folder.read_into(self.name, self.position, [memoryview(buffer).cast("B")])
        self.position += count
        return count
