"""A labelled grid of images as one PNG: a row per prompt, a column per setting."""

from __future__ import annotations

import textwrap

from PIL import Image, ImageDraw, ImageFont

MARGIN = 12
FONT_SIZE = 15


def draw_grid(
    images: list[list[Image.Image]],
    rows: list[str],
    columns: list[str],
    *,
    cell: int = 160,
    under: list[list[str]] | None = None,
) -> Image.Image:
    """Arrange `images[row][column]` under their labels.

    Args:
        images: all of one size; small ones are enlarged without smoothing.
        rows: a label per row, wrapped in the left margin.
        columns: a label per column; it may have several lines.
        cell: the least width of an image, in pixels.
        under: a line under each image.
    """
    font = ImageFont.load_default(FONT_SIZE)
    scale = max(1, -(-cell // images[0][0].width))
    width, height = images[0][0].width * scale, images[0][0].height * scale
    head = FONT_SIZE * (1 + max(label.count("\n") + 1 for label in columns)) + MARGIN
    left, foot = 220, 0 if under is None else FONT_SIZE + 4
    canvas = Image.new(
        "RGB",
        (left + len(columns) * (width + MARGIN), head + len(rows) * (height + foot + MARGIN)),
        "white",
    )
    draw = ImageDraw.Draw(canvas)
    for column, label in enumerate(columns):
        draw.text((left + column * (width + MARGIN), MARGIN), label, "black", font)
    for row, label in enumerate(rows):
        top = head + row * (height + foot + MARGIN)
        draw.text((MARGIN, top), textwrap.fill(label, 26), "black", font)
        for column, image in enumerate(images[row]):
            enlarged = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(enlarged, (left + column * (width + MARGIN), top))
            if under is not None:
                draw.text((left + column * (width + MARGIN), top + height + 2), under[row][column], "black", font)
    return canvas
