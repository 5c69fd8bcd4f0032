"""What an ingest writes for clips and captions that have no fault does not change from one version to the next."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

import pytest

from megasora.config import load
from megasora.ingest import ingest
from megasora.ingest.output_folder import SPEC_FILE

CAPTIONS = {"a.txt": b"\xef\xbb\xbf one\r\ntwo ", "b.json": b'{"caption": "a caf\\u00e9", "id": 1}'}
TABLE = '{"file": "c d.png", "caption": "from the table"}\n\n{"file": "deep/e.png", "caption": "狐 🦊"}\n'
# source -> (listing_sha256, SHA-256 of the names, offsets, sizes and contents of all members but the patches)
GOLDEN = {
    "folder": (
        "71cc33b27140305e6c1dabf832361567f26029b7170c5021f9bbbc88b5443016",
        "ce646cf7a2d56905b485ee8a04e9487cb5ef364ed4b8f1e57934116f91d94992",
    ),
    "tar": (
        "d06f80af4ae83b9f060a608afce83ce939e92bef11918b897319fd7ec1fa93c0",
        "545d7602844b0fed57b119d47598367d325d7ee7067003a46b0cb90f9dd7b8f8",
    ),
    "list.jsonl": (
        "495e938734cabcfb8614841b1514b477042e61a22c37f854430781251a709c6e",
        "d134371bf88fd3cd1b5a5d395939308e492b1b2407525cf167c1db4ad3e758c0",
    ),
}


def grey_png(level: int, height: int, width: int) -> bytes:
    """A PNG file that is not compressed, so that its bytes do not depend on a library."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + bytes([level]) * 3 * width) * height
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    stored = b"\x78\x01\x01" + struct.pack("<HH", len(rows), len(rows) ^ 0xFFFF) + rows
    stored += struct.pack(">I", zlib.adler32(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", stored) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    names = ["a.png", "b.png", "c d.png", "deep/e.png", "val/f.png"]
    for level, name in enumerate(names):
        path = folder / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(grey_png(40 * level, 16, 24))
    for name, data in CAPTIONS.items():
        (folder / "folder" / name).write_bytes(data)
    (folder / "folder" / "val" / "f.txt").write_text("held out")
    (folder / "folder" / "captions.jsonl").write_text(TABLE, encoding="utf-8")
    with tarfile.open(folder / "tar", "w") as tar:
        for name in ("b.png", "b.json", "a.png", "a.txt", "deep/e.png"):
            data = (folder / "folder" / name).read_bytes()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (folder / "tar").rename(folder / "tar.tar")
    lines = [{"file": "folder/c d.png", "caption": "listed"}, {"file": "folder/a.png", "split": "val"}]
    (folder / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize("source", GOLDEN)
def test_listing_and_records_are_those_of_earlier_versions(source, sources, tmp_path):
    overrides = ["codec.channels=24", "ingest.workers=1", "ingest.missing_caption=empty", "ingest.clips_per_block=3"]
    path = sources / ("tar.tar" if source == "tar" else source)
    ingest(path, tmp_path / "out", load(None, overrides))
    digest = hashlib.sha256()
    for shard in sorted((tmp_path / "out").glob("*.tar")):
        with tarfile.open(shard) as tar:
            for info in tar:
                content = b"" if ".patches." in info.name else tar.extractfile(info).read()
                digest.update(f"{shard.name} {info.name} {info.offset_data} {info.size} ".encode() + content)
    listing = json.loads((tmp_path / "out" / SPEC_FILE).read_text())["listing_sha256"]
    assert (listing, digest.hexdigest()) == GOLDEN[source]
