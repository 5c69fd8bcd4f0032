"""`megasora shards DIR --show ID FILE`: draws a clip of a dataset into a contact sheet."""

from __future__ import annotations

import json
import re
from pathlib import Path

from megasora.data.clip_writer import write_image
from megasora.errors import MegaSoraError, printable
from megasora.observe.inspect_shards import decode_clip, preview
from megasora.sampling.sheet import contact_sheet

MAX_TITLE = 120  # characters


def show_clip(folder: str, sample_id: str, out: Path) -> None:
    """Decodes the clip with this id, writes the sheet to `out` (.png) and prints caption and metadata."""
    if not re.fullmatch("[0-9]{1,18}", sample_id) or out.suffix != ".png":
        words = f"--show {printable(sample_id, 60)} {out}"
        raise MegaSoraError(f"{words}: give a sample id, a whole number, and the name of a .png file")
    if not out.parent.is_dir():
        raise MegaSoraError(f"--show {out}: there is no folder {out.parent}; make it first")
    frames, metadata = decode_clip(folder, int(sample_id))
    tiles, zoom = preview(frames)
    title = f"{sample_id}: {metadata['caption']}"[:MAX_TITLE]
    write_image(contact_sheet([(title, tiles)], len(tiles), zoom), out, comment=json.dumps(metadata))
    for key, value in metadata.items():
        print(f"{printable(key):>14}  {printable(json.dumps(value, ensure_ascii=False))}")
    print(f"drawn into {out}")
