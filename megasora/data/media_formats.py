"""The formats of clips: by suffix, by the first bytes of a file, and the library's name of each.

A file is opened in one format, named to the library, never guessed by it: a guessing demuxer would follow a text file
to other local files. The format is that of the first bytes, since suffixes are often wrong, if it is one of those that
are read; a file whose first bytes are of no known format is opened as its suffix says.
"""

from __future__ import annotations

import codecs

ALPHA_BACKGROUND = (255, 255, 255)  # RGB under what is transparent: browsers and viewers show pictures on white

# suffix -> demuxer of FFmpeg
VIDEO_FORMATS = {
    ".mp4": "mp4",
    ".m4v": "mp4",
    ".3gp": "mp4",
    ".mov": "mov",
    ".mkv": "matroska",
    ".webm": "webm",
    ".avi": "avi",
    ".ts": "mpegts",
    ".mts": "mpegts",
    ".m2ts": "mpegts",
    ".mpg": "mpeg",
    ".mpeg": "mpeg",
    ".flv": "flv",
    ".wmv": "asf",
    ".ogv": "ogg",
}
# suffix -> format of Pillow; GIF, PNG, WebP and AVIF files may be animations
IMAGE_FORMATS = {
    ".png": "PNG",
    ".apng": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".gif": "GIF",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".avif": "AVIF",
}
CLIP_FILES = " ".join((*VIDEO_FORMATS, *IMAGE_FORMATS))  # for messages

# real format -> name in FFmpeg or Pillow, of those that are read
FFMPEG_NAMES = {
    "MP4": "mp4",
    "MOV": "mov",
    "3GP": "mp4",
    "Matroska": "matroska",
    "WebM": "webm",
    "AVI": "avi",
    "MPEG-TS": "mpegts",
    "MPEG-PS": "mpeg",
    "FLV": "flv",
    "ASF": "asf",
    "Ogg": "ogg",
}
PILLOW_NAMES = {
    "PNG": "PNG",
    "JPEG": "JPEG",
    "WebP": "WEBP",
    "GIF": "GIF",
    "BMP": "BMP",
    "TIFF": "TIFF",
    "AVIF": "AVIF",
}

FIRST_BYTES = 1024  # that `real_format` needs
SIGNATURES = (  # (first bytes, where they are, format)
    (b"\x89PNG\r\n\x1a\n", 0, "PNG"),
    (b"\xff\xd8\xff", 0, "JPEG"),
    (b"GIF87a", 0, "GIF"),
    (b"GIF89a", 0, "GIF"),
    (b"II*\0", 0, "TIFF"),
    (b"MM\0*", 0, "TIFF"),
    (b"FLV\x01", 0, "FLV"),
    (b"OggS", 0, "Ogg"),
    (b"\0\0\x01\xba", 0, "MPEG-PS"),
    (bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c"), 0, "ASF"),
    (b"8BPS", 0, "PSD"),
    (b"%PDF-", 0, "PDF"),
    (b"PK\x03\x04", 0, "ZIP"),
    (b"\x1f\x8b", 0, "gzip"),
    (b"ID3", 0, "MP3"),
    (b"\xff\x0a", 0, "JPEG XL"),
    (b"JXL \r\n\x87\n", 4, "JPEG XL"),
    (b"jP  \r\n\x87\n", 4, "JPEG 2000"),
    (b"version https://git-lfs", 0, "Git LFS pointer"),
)
RIFF_TYPES = {b"WEBP": "WebP", b"AVI ": "AVI", b"WAVE": "WAV"}
BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"qt  ": "MOV", b"heic": "HEIC", b"heix": "HEIC", b"hevc": "HEIC"}
MOV_ATOMS = (b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")  # of QuickTime files without `ftyp`
BMP_HEADER_SIZES = (12, 40, 52, 56, 64, 108, 124)


def real_format(first_bytes: bytes) -> str | None:
    """The format of a file from its first `FIRST_BYTES` bytes, such as "WebP", "MP4", "HTML", "text"; None: unknown."""
    for signature, offset, name in SIGNATURES:
        if first_bytes[offset : offset + len(signature)] == signature:
            return name
    if first_bytes[:4] == b"RIFF":
        return RIFF_TYPES.get(first_bytes[8:12])
    if first_bytes[4:8] == b"ftyp":
        return format_of_brands(first_bytes)
    if first_bytes[4:8] in MOV_ATOMS:
        return "MOV"
    if first_bytes[:4] == b"\x1a\x45\xdf\xa3":
        return "WebM" if b"webm" in first_bytes[:64] else "Matroska"
    if first_bytes[:2] == b"BM" and int.from_bytes(first_bytes[14:18], "little") in BMP_HEADER_SIZES:
        return "BMP"
    if is_transport_stream(first_bytes):
        return "MPEG-TS"
    return format_of_text(first_bytes)


def format_of_brands(first_bytes: bytes) -> str:
    """The format of an ISO base media file from the brands of its first box."""
    end = min(int.from_bytes(first_bytes[:4], "big"), len(first_bytes))
    brands = [first_bytes[8:12], *(first_bytes[i : i + 4] for i in range(16, end - 3, 4))]
    if brands[0] in (b"mif1", b"msf1"):
        return next((BRANDS[brand] for brand in brands if brand in BRANDS), "HEIC")
    return "3GP" if brands[0][:2] == b"3g" else BRANDS.get(brands[0], "MP4")


def is_transport_stream(first_bytes: bytes) -> bool:
    """True if packets of 188 bytes, or of 192 with a time code first (.m2ts), begin with the byte 0x47."""
    return any(first_bytes[start : start + 4 * size : size] == b"GGGG" for start, size in ((0, 188), (4, 192)))


def format_of_text(first_bytes: bytes) -> str | None:
    """ "HTML", "XML" or "text" for bytes that are UTF-8 text without control characters, else None."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(first_bytes)
    except UnicodeDecodeError:
        return None
    text = text.lstrip("\ufeff \t\r\n").lower()
    if text.startswith(("<!doctype html", "<html", "<head", "<body")):
        return "HTML"
    if text.startswith(("<?xml", "<svg")):
        return "XML"
    return "text" if text and not any(c < " " and c not in "\t\r\n\f" for c in text) else None


def format_to_open(suffix: str, first_bytes: bytes) -> str:
    """The name in Pillow or FFmpeg of the format to open a file in, from its suffix and its first bytes.

    Raises ValueError, with a message that continues the file's name, if the first bytes are of a format that is not
    read.
    """
    named, real = IMAGE_FORMATS.get(suffix) or VIDEO_FORMATS[suffix], real_format(first_bytes)
    if real is None:
        return named
    if real not in PILLOW_NAMES and real not in FFMPEG_NAMES:
        raise ValueError(
            f"is {with_article(real)} file named {suffix}; rename it, or convert it to one of {CLIP_FILES}"
        )
    return PILLOW_NAMES.get(real) or FFMPEG_NAMES[real]


def with_article(name: str) -> str:
    """`name` with the article a or an, as it is spoken."""
    spoken_as_vowel = "AEFHILMNORSX" if name[:2].isupper() else "AEIOUaeiou"
    return f"{'an' if name[0] in spoken_as_vowel else 'a'} {name}"
