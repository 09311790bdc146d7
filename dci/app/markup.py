"""Pieces of HTML: images that lie in the page itself, so that nothing has to be served from a disk."""

import base64
import io
from html import escape

import numpy as np
from PIL import Image

SIDE = 512
"""Pixels of an image's longer side on the page, at most; downloads have all of them."""


def image_url(image: Image.Image, lossless: bool = True) -> str:
    """Return an image, made smaller where it is large, as a data: URL.

    Args:
        lossless: as PNG where the image is small; else as WebP, for what is shown for a moment.
    """
    shown = image.copy()
    shown.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    content, small = io.BytesIO(), lossless and max(shown.size) <= SIDE // 2
    shown.save(content, "PNG") if small else shown.save(content, "WEBP", quality=85)
    return data_url(content.getvalue(), f"image/{'png' if small else 'webp'}")


def data_url(content: bytes, kind: str) -> str:
    """Return a file's content as a data: URL."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def figure(image: Image.Image, text: str, lossless: bool = True, caption: str | None = None) -> str:
    """Return an image with a caption below it.

    Args:
        text: for readers who do not see it.
        caption: in place of no caption; it is escaped.
    """
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    url = image_url(image, lossless)
    return f'<figure><img src="{url}" alt="{escape(text)}">{below}</figure>'


def progress(done: int, of: int, text: str) -> str:
    """Return a progress bar with words beside it."""
    share = f'<progress max="{of}" value="{done}" aria-label="Progress"></progress>'
    return f'<div class="dci-progress">{share}<span>{escape(text)}</span></div>'


def note(text: str) -> str:
    """Return a note, a line in quiet colours."""
    return f'<p class="dci-note">{escape(text)}</p>' if text else ""


def error(text: str) -> str:
    """Return a line that says what is wrong, and is read aloud."""
    return f'<p class="dci-error" role="alert">{escape(text)}</p>'


def curve(values: list[tuple[int, float]], steps: int, label: str) -> str:
    """Return a line plot as SVG in the page's colours.

    Args:
        values: (step, value), of rising steps.
        steps: where the axis ends.
        label: of the vertical axis.
    """
    if not values:
        return ""
    wide, tall, left, bottom = 640, 200, 44, 24
    numbers = np.array([value for _, value in values])
    top = float(numbers.max()) * 1.05 or 1.0
    points = [(left + (wide - left - 8) * s / max(steps, 1), 8 + (tall - bottom - 8) * (1 - v / top)) for s, v in values]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    last_x, last_y = points[-1]
    described = f"{label} over {steps} steps; at step {values[-1][0]} it is {values[-1][1]:.3f}"
    return (
        f'<svg class="dci-curve" viewBox="0 0 {wide} {tall}" role="img" aria-label="{escape(described)}">'
        f'<path d="M{left} 8V{tall - bottom}H{wide - 8}" class="axis"/>'
        f'<text x="{left - 6}" y="16" class="end">{top:.2f}</text>'
        f'<text x="{left - 6}" y="{tall - bottom}" class="end">0</text>'
        f'<text x="{left}" y="{tall - 6}">0</text><text x="{wide - 8}" y="{tall - 6}" class="end">{steps} steps</text>'
        f'<polyline points="{line}"/><circle cx="{last_x:.1f}" cy="{last_y:.1f}" r="3"/></svg>'
    )
