"""Image files by Pillow: what they are, and their pixels. The only importer of Pillow.

A file says its size in its first bytes; one that claims more pixels than any real picture is refused before it is
decoded.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from railbus.importers.source import Array, unreadable
from railbus_shared.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

FORMATS: Final = {"JPEG": "jpeg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}
MIXED: Final = "image"
"""The encoding of a column that holds files of several formats; each tells its own in its first bytes."""
_MAX_PIXELS: Final = 89_000_000


@dataclass(frozen=True)
class Looks:
    """What an image file says of itself."""

    encoding: str
    width: int
    height: int


def look(data: bytes, *, name: str) -> Looks:
    """Format and size, without decoding; raises InvalidField for what is no image or claims too many pixels."""
    with _opened(data, name) as image:
        return Looks(FORMATS[image.format or ""], image.width, image.height)


def pixels(data: bytes, *, name: str, size: tuple[int, int] | None = None) -> Array:
    """Red, green and blue, uint8 (height, width, 3), scaled to a width and height where they are given."""
    with _opened(data, name) as image:
        if size is not None:
            image.draft("RGB", size)  # a JPEG is decoded at a fraction of its size where that suffices
        plain = image.convert("RGB")
        if size is not None and plain.size != size:
            from PIL import Image  # noqa: PLC0415 - an extra

            plain = plain.resize(size, Image.Resampling.BILINEAR)
        return np.asarray(plain)


def encoding_of(data: bytes) -> str:
    """The encoding that the first bytes tell, or an empty text; needs no Pillow."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    return "png" if data.startswith(b"\x89PNG\r\n\x1a\n") else ""


@contextmanager
def _opened(data: bytes, name: str) -> Iterator[Image.Image]:
    try:
        from PIL import Image, UnidentifiedImageError  # noqa: PLC0415 - an extra
    except ImportError as exc:
        raise ConfigError("image files need the package Pillow", hint="pip install 'railbus[images]'") from exc
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
            with Image.open(io.BytesIO(data), formats=list(FORMATS)) as image:
                if image.width * image.height > _MAX_PIXELS:
                    raise unreadable(name, f"it claims {image.width} × {image.height} pixels")
                yield image
    except UnidentifiedImageError as exc:
        raise unreadable(name, "it is no image", hint=f"known are {', '.join(FORMATS)}") from exc
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as exc:
        raise unreadable(name, f"it claims too many pixels: {exc}") from exc
    except (OSError, SyntaxError, ValueError) as exc:
        raise unreadable(name, f"it is a damaged image: {exc}") from exc
