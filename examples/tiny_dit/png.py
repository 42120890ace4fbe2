"""Pictures and curves as PNG files, with pillow alone."""

import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw


def to_image(picture: torch.Tensor) -> Image.Image:
    """A picture [3, height, width] in -1..1."""
    pixels = ((picture.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def save_grid(
    pictures: torch.Tensor,
    path: str | Path,
    columns: int = 4,
    labels: list[str] | None = None,
    scale: int = 1,
) -> None:
    """Write pictures [batch, 3, height, width] side by side, each over its label if `labels` are given."""
    images = [to_image(picture) for picture in pictures]
    images = [image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC) for image in images]
    gap, line = 4, 16 if labels else 0
    width, height = images[0].width + gap, images[0].height + gap + line
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (min(columns, len(images)) * width + gap, rows * height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for index, image in enumerate(images):
        x, y = gap + index % columns * width, gap + index // columns * height
        sheet.paste(image, (x, y))
        if labels:
            draw.text((x + 1, y + image.height + 1), labels[index], fill="black")
    sheet.save(path, optimize=True)


def save_curve(points: list[tuple[float, float]], path: str | Path, title: str, x_name: str, y_name: str) -> None:
    """Write a curve of (x, y) points, y on a logarithmic axis."""
    width, height, left, right, top, bottom = 720, 400, 64, 20, 34, 46
    sheet = Image.new("RGB", (2 * width, 2 * height), "white")  # drawn at double size, then shrunk: smooth lines
    draw = ImageDraw.Draw(sheet)
    xs, ys = [x for x, _ in points], [math.log10(y) for _, y in points]
    low_x, high_x, low_y, high_y = min(xs), max(xs), min(ys) - 0.03, max(ys) + 0.03

    def at(x, y):
        across = (x - low_x) / max(high_x - low_x, 1e-9)
        up = (y - low_y) / max(high_y - low_y, 1e-9)
        return 2 * (left + across * (width - left - right)), 2 * (height - bottom - up * (height - top - bottom))

    for mark in (m * 10.0**e for e in range(-4, 2) for m in (1, 1.5, 2, 3, 5, 7)):
        if low_y <= math.log10(mark) <= high_y:
            y = at(low_x, math.log10(mark))[1]
            draw.line((2 * left, y, 2 * (width - right), y), fill="#dddddd", width=2)
            draw.text((2 * left - 12, y), f"{mark:g}", fill="#333333", anchor="rm", font_size=24)
    span = max(high_x - low_x, 1e-9)
    unit = 10 ** math.floor(math.log10(span))
    tick = next(tick for tick in (unit / 5, unit / 2, unit, 2 * unit) if span / tick <= 8)
    for i in range(math.ceil(low_x / tick), math.floor(high_x / tick) + 1):
        x = at(i * tick, low_y)[0]
        draw.text((x, 2 * (height - bottom) + 8), f"{i * tick:g}", fill="#333333", anchor="mt", font_size=24)
    draw.line([at(x, y) for x, y in zip(xs, ys, strict=True)], fill="#2a6fb0", width=4, joint="curve")
    draw.text((width, 16), title, fill="black", anchor="mt", font_size=28)
    draw.text((width, 2 * height - 16), x_name, fill="#333333", anchor="mb", font_size=24)
    draw.text((2 * left, 2 * top - 8), y_name, fill="#333333", anchor="lb", font_size=24)
    sheet.resize((width, height), Image.Resampling.LANCZOS).save(path, optimize=True)
