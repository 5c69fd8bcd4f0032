"""Contact sheets: one image with a row of frames per video, below its prompt."""

from __future__ import annotations

import numpy as np

TEXT_HEIGHT, GAP = 14, 4  # pixels
BACKGROUND, INK = (24, 24, 28), (230, 230, 230)


def contact_sheet(videos: list[tuple[str, np.ndarray]], frames: int = 8, zoom: int = 3) -> np.ndarray:
    """[(prompt, uint8 [F, H, W, 3])] -> uint8 [height, width, 3]: evenly spaced frames, enlarged `zoom` times."""
    from PIL import Image, ImageDraw, ImageFont

    rows = []
    for prompt, video in videos:
        index = np.unique(np.linspace(0, len(video) - 1, min(frames, len(video))).round().astype(int))
        tiles = [video[i].repeat(zoom, 0).repeat(zoom, 1) for i in index]
        height, width = tiles[0].shape[:2]
        label = prompt.encode("latin-1", "replace").decode("latin-1")
        across = max(len(tiles) * (width + GAP), int(ImageFont.load_default().getlength(label)) + GAP)
        row = Image.new("RGB", (GAP + across, TEXT_HEIGHT + height + GAP), BACKGROUND)
        for i, tile in enumerate(tiles):
            row.paste(Image.fromarray(tile), (GAP + i * (width + GAP), TEXT_HEIGHT))
        ImageDraw.Draw(row).text((GAP, 1), label, fill=INK)
        rows.append(np.array(row))
    return stacked(rows)


def stacked(rows: list[np.ndarray]) -> np.ndarray:
    """uint8 [height, width, 3] each -> one below the other, in an image of the width of the widest."""
    sheet = np.full((sum(map(len, rows)), max(row.shape[1] for row in rows), 3), BACKGROUND, np.uint8)
    top = 0
    for row in rows:
        sheet[top : top + len(row), : row.shape[1]] = row
        top += len(row)
    return sheet
