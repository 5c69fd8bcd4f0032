"""Tars are read strictly: all members unchanged, or an error with the byte; nothing ends early without an error."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest

from megasora.data.tar import (
    BLOCK_BYTES,
    END_OF_ARCHIVE,
    DamagedTar,
    Member,
    group_by_key,
    padded_size,
    read_files,
    read_members,
    write_header,
)
from megasora.errors import MegaSoraError

TXT = {"txt"}
NAMES = [
    "a.txt",
    "with space.txt",
    'it\'s "quoted".txt',
    "🦊 狐.txt",
    "deep/er/a.txt",
    "x" * 300 + ".txt",
    "new\nline.txt",
]


def make(names=NAMES, format=tarfile.GNU_FORMAT, size=700) -> tuple[bytes, dict[str, bytes]]:
    """A tar written by Python, and its contents: name -> bytes without a zero."""
    rng, buffer, contents = np.random.default_rng(0), io.BytesIO(), {}
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name in names:
            contents[name] = rng.integers(1, 256, size, dtype=np.uint8).tobytes()
            info = tarfile.TarInfo(name)
            info.size = size
            tar.addfile(info, io.BytesIO(contents[name]))
    return buffer.getvalue(), contents


def plain(*files: tuple[str, bytes]) -> bytes:
    return b"".join(write_header(n, len(c)) + c.ljust(padded_size(len(c)), b"\0") for n, c in files) + END_OF_ARCHIVE


def special(name="a.txt", **attributes) -> bytes:
    """A tar of one header with these attributes."""
    info = tarfile.TarInfo(name)
    for key, value in attributes.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT) + END_OF_ARCHIVE


def pax(key: str, value: str) -> bytes:
    rest = f" {key}={value}\n"
    return next(f"{n}{rest}".encode() for n in range(100) if n == len(f"{n}{rest}"))


def rewritten(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def resealed(block: bytes) -> bytes:
    """A header with its checksum corrected."""
    block = rewritten(block, 148, b" " * 8)
    return rewritten(block, 148, b"%06o\0 " % sum(block))


def members(data: bytes, extensions=TXT) -> list[Member]:
    return list(read_members(io.BytesIO(data), extensions, "some.tar"))


def assert_damaged(data: bytes, words: str, at: int | None = None, extensions=TXT) -> DamagedTar:
    with pytest.raises(DamagedTar, match=words) as error_info:
        members(data, extensions)
    assert isinstance(error_info.value, MegaSoraError) and str(error_info.value).startswith("some.tar: byte ")
    assert at is None or error_info.value.offset == at
    return error_info.value


# ---------------------------------------------------------------- valid tars


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_wrote(format):
    names = [name for name in NAMES if len(name) < 100 or format != tarfile.USTAR_FORMAT]
    names += ["f" * 80 + "/" + "g" * 80 + ".txt"]  # ustar splits it into prefix and name
    data, contents = make(names, format)
    found = members(data)
    assert [member.name for member in found] == names
    for name, offset, size in found:
        assert data[offset : offset + size] == contents[name]


def test_files_of_all_sizes_are_found_at_the_offsets_of_tarfile():
    files = [(f"{size}.txt", b"x" * size) for size in (0, 1, 511, 512, 513, 1024, 5000)]
    data = plain(*files)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(info.name, info.offset_data, info.size) for info in tar]
    assert [tuple(member) for member in members(data)] == expected


def test_a_header_is_the_one_of_tarfile_up_to_terabytes():
    for size in (0, 511, 8 << 30, 5 << 40):
        info = tarfile.TarInfo.frombuf(write_header("000000001.patches.f16", size), "utf-8", "strict")
        assert (info.name, info.size, info.mtime, info.isreg()) == ("000000001.patches.f16", size, 0, True)


def test_a_size_in_pax_records_overrides_the_header():
    """As for files beyond 8 GiB."""
    record = pax("size", "700")
    info = tarfile.TarInfo("@PaxHeader")
    info.size, info.type = len(record), tarfile.XHDTYPE
    file = rewritten(write_header("a.txt", 0), 124, b"00000000000\0")
    data = (
        info.tobuf(tarfile.USTAR_FORMAT)
        + record.ljust(BLOCK_BYTES, b"\0")
        + resealed(file)
        + b"x" * 1024
        + END_OF_ARCHIVE
    )
    assert members(data) == [Member("a.txt", 3 * BLOCK_BYTES, 700)]


def test_folders_are_skipped_and_leading_dots_are_removed_from_names():
    folder = special("./deep/", type=tarfile.DIRTYPE)[:BLOCK_BYTES]
    assert [m.name for m in members(folder + plain(("./deep//a.txt", b"x"), ("./b.txt", b"y")))] == [
        "deep/a.txt",
        "b.txt",
    ]


def test_the_key_is_the_name_up_to_the_first_dot_of_its_last_part():
    data = plain(("v1.0/a.part.txt", b"1"), ("v1.0/a.TXT", b"22"), ("v2/a.txt", b"3"))
    found = group_by_key(members(data, {"txt", "part.txt"}))
    assert {key: {e: size for e, (_, size) in files.items()} for key, files in found.items()} == {
        "v1.0/a": {"part.txt": 1, "txt": 2},
        "v2/a": {"txt": 1},
    }


def test_grouping_is_that_of_webdataset(tmp_path):
    import webdataset

    data, contents = make(["a.txt", "a.b.txt", "v1.0/a.txt", "with space.txt", "🦊.txt"])
    (tmp_path / "x.tar").write_bytes(data)
    expected = {
        sample["__key__"]: {k: v for k, v in sample.items() if not k.startswith("__")}
        for sample in webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False)
    }
    groups = group_by_key(members(data, {"txt", "b.txt"}))
    read = {key: {e: data[o : o + s] for e, (o, s) in files.items()} for key, files in groups.items()}
    assert read == expected


def test_other_extensions_are_an_error():
    data = plain(("a.txt", b"1"), ("a.pkl", b"2"), ("b.txt", b"3"), ("noextension", b"4"), (".hidden", b"5"))
    assert_damaged(data, r"'a.pkl' is no file of the format; these are: txt", 2 * BLOCK_BYTES)
    for name in ("noextension", ".hidden"):
        assert_damaged(plain(("a.txt", b"1"), (name, b"4")), f"'{name}' is no file of the format", 2 * BLOCK_BYTES)


def test_a_name_that_is_not_utf_8_keeps_its_bytes_in_a_raw_tar():
    data = resealed(rewritten(special()[:BLOCK_BYTES], 0, b"caf\xe9.txt\0")) + END_OF_ARCHIVE
    (member,) = read_files(io.BytesIO(data), "some.tar")
    assert member.name.encode("utf-8", "surrogateescape") == b"caf\xe9.txt"
    assert_damaged(data, "is not UTF-8", 0)


def test_the_caller_may_read_between_two_members():
    data, contents = make()
    file = io.BytesIO(data)
    for name, offset, size in read_members(file, TXT):
        file.seek(offset)
        assert file.read(size) == contents[name]


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_one_flipped_bit_in_any_header_is_an_error_at_that_header(format):
    """tarfile takes such a header for the end of the archive."""
    data, _ = make(["a.txt", "狐" * 60 + ".txt", "b.txt"], format)
    headers = [at for at in range(0, len(data), BLOCK_BYTES) if data[at + 257 : at + 262] == b"ustar"]
    assert len(headers) >= 4
    rng = np.random.default_rng(1)
    for at in headers:
        for bit in rng.integers(0, 8 * 500, 40):
            byte = at + int(bit) // 8
            assert_damaged(
                rewritten(data, byte, bytes([data[byte] ^ 1 << int(bit) % 8])), "checksum of the header|no tar", at
            )


def test_a_cut_at_any_byte_is_an_error():
    data = plain(("a.txt", b"x" * 700), ("b.txt", b"y" * 512), ("c.txt", b""))
    whole = members(data)
    for length in range(0, len(data), 128):
        error = assert_damaged(data[:length], "empty|cut|are left of the archive|half an end|ends")
        assert error.offset <= length
    assert_damaged(data[: whole[1].offset - BLOCK_BYTES], "cut between two members", whole[1].offset - BLOCK_BYTES)
    assert_damaged(data[: whole[1].offset + 7], "'b.txt' has 512 bytes, 7 are left", whole[1].offset - BLOCK_BYTES)
    assert_damaged(data[:-BLOCK_BYTES], "half an end", len(data) - 2 * BLOCK_BYTES)


@pytest.mark.parametrize("size", [512, 1024])
def test_a_zeroed_hole_over_a_header_is_an_error_at_the_hole(size):
    data, _ = make()
    for member in members(data)[:-1]:
        if member.name.startswith("x" * 100):
            continue  # its header follows one for the name
        at = member.offset - BLOCK_BYTES
        assert_damaged(rewritten(data, at, bytes(size)), "more from byte .* a hole", at)


def test_a_hole_to_the_end_is_an_error():
    data = plain(("a.txt", b"x" * 700), ("b.txt", b"y" * (2 << 20)))
    at = members(data)[1].offset - BLOCK_BYTES
    assert_damaged(rewritten(data, at, bytes(len(data) - at)), "zeros for .* bytes, to the end", at)


def test_anything_after_the_end_except_zeros_is_an_error():
    data = plain(("a.txt", b"x"))
    assert members(data + bytes(9 * 1024)) == members(data)
    for rest in (b"x", bytes(3000) + b"x", plain(("b.txt", b"y"))):
        assert_damaged(data + rest, "the archive ends, but there is more from byte", len(data) - len(END_OF_ARCHIVE))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html><body>404 not found</body></html>".ljust(5000), "no tar: it begins with b'<!DOCTYPE"),
        (b"<html>404</html>", "cut: 16 of 512 bytes"),
        (bytes(100), "cut: 100 of 512"),
        (b"PK\x03\x04" * 1000, "no tar"),
    ],
    ids=["empty", "html", "short html", "short zeros", "zip"],
)
def test_the_error_for_a_file_that_is_no_tar_has_its_first_bytes(data, words):
    assert_damaged(data, words, 0)


def test_an_empty_archive_has_no_member():
    assert members(END_OF_ARCHIVE) == members(bytes(10240)) == []


def test_a_duplicate_file_or_key_is_an_error():
    assert_damaged(plain(("a.txt", b"1"), ("a.txt", b"2")), "'a.txt' occurs twice", 2 * BLOCK_BYTES)
    assert_damaged(plain(("a.txt", b"1"), ("./a.txt", b"2")), "occurs twice")
    assert_damaged(plain(("a.txt", b"1"), ("a.TXT", b"2")), "occurs twice")
    assert_damaged(
        plain(("a.txt", b"1"), ("b.txt", b"2"), ("a.png", b"3")), "'a' occurs twice", 4 * BLOCK_BYTES, {"txt", "png"}
    )


# ---------------------------------------------------------------- hostile tars


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (special(type=tarfile.SYMTYPE, linkname="/etc/passwd"), "a symbolic link"),
        (special(type=tarfile.LNKTYPE, linkname="b.txt"), "a hard link"),
        (special(type=tarfile.CHRTYPE), "a character device"),
        (special(type=tarfile.BLKTYPE), "a block device"),
        (special(type=tarfile.FIFOTYPE), "a fifo"),
        (special(type=tarfile.CONTTYPE), "a contiguous file"),
        (special(type=tarfile.GNUTYPE_SPARSE), "a sparse file"),
        (special(type=b"V"), "of type b'V'"),
        (special(type=tarfile.SYMTYPE, linkname="l" * 200), "a link with a long name"),
        (
            resealed(rewritten(special("d", type=b"5")[:BLOCK_BYTES], 124, b"00000000005\0")) + END_OF_ARCHIVE,
            "5 bytes of content",
        ),
        (special("/etc/a.txt"), "leads out of the archive"),
        (special("../a.txt"), "leads out of the archive"),
        (special("a/../../b.txt"), "leads out of the archive"),
        (special("/" + "x" * 200 + ".txt"), "leads out of the archive"),
        (special(size=8 << 40), "'a.txt' has 8796093022208 bytes, 1024 are left"),
        (special(size=(1 << 63) - 1), "has 9223372036854775807 bytes"),
        (resealed(rewritten(special()[:BLOCK_BYTES], 124, b"-0000000001\0")) + END_OF_ARCHIVE, "a size of"),
        (resealed(rewritten(special()[:BLOCK_BYTES], 124, b"\xff" * 12)) + END_OF_ARCHIVE, "a size of"),
        (resealed(rewritten(special()[:BLOCK_BYTES], 0, b"\xff\xfe.txt")) + END_OF_ARCHIVE, "is not UTF-8"),
        (resealed(rewritten(special()[:BLOCK_BYTES], 0, bytes(100))) + END_OF_ARCHIVE, "a file without a name"),
        (resealed(rewritten(special()[:BLOCK_BYTES], 257, bytes(8))) + END_OF_ARCHIVE, "not one of ustar"),
        (special(type=b"L", size=1 << 30), "a name of 1073741824 bytes"),
        (special(type=b"x", size=1 << 30), "a name of 1073741824 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_hostile_members_are_errors_with_their_kind(data, words):
    assert_damaged(data, words)


@pytest.mark.parametrize(
    ("records", "words"),
    [
        (pax("GNU.sparse.major", "1"), "a sparse file"),
        (pax("path", "/etc/a.txt"), "leads out of the archive"),
        (pax("path", "../a.txt"), "leads out of the archive"),
        (pax("size", "-1"), "a size of '-1'"),
        (pax("size", "9" * 19), "are left of the archive"),
        (b"99999 path=x\n", "cannot be read"),
        (b"0 path=x\n", "cannot be read"),
        (b"9 path=x \n", "cannot be read"),
        (b"junk", "cannot be read"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_hostile_pax_records_are_errors(records, words, kind):
    info = tarfile.TarInfo("pax")
    info.size, info.type = len(records), kind
    data = info.tobuf(tarfile.USTAR_FORMAT) + records.ljust(BLOCK_BYTES, b"\0") + plain(("a.txt", b"x"))
    assert_damaged(data, words if kind == tarfile.XHDTYPE else f"{words}|one name or size for all")


def test_a_long_name_without_a_file_is_an_error():
    data = special("n" * 200 + ".txt")
    assert_damaged(
        data[: 2 * BLOCK_BYTES] + END_OF_ARCHIVE, "the archive ends where the file with this name should be", 0
    )


def test_global_comments_as_written_by_git_are_skipped():
    record = pax("comment", "0123456789" * 4)
    info = tarfile.TarInfo("pax_global_header")
    info.size, info.type = len(record), tarfile.XGLTYPE
    data = info.tobuf(tarfile.USTAR_FORMAT) + record.ljust(BLOCK_BYTES, b"\0") + plain(("a.txt", b"x"))
    assert [m.name for m in members(data)] == ["a.txt"]
