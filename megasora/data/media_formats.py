"""The files that are clips: their suffixes, and the formats that they are opened in."""

from __future__ import annotations

# suffix -> demuxer of FFmpeg
VIDEO_FORMATS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm", ".avi": "avi"}
IMAGE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # suffix -> format of Pillow
CLIP_FILES = " ".join((*VIDEO_FORMATS, *IMAGE_FORMATS))  # for messages
