"""Pictures out of samples, and PNG files out of pictures, with nothing but zlib.

What is a picture: uint8 or other numbers of shape (H, W), (1|3, H, W) or (H, W, 1|3); or a file of an image, which
Pillow decodes.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from railbus.exporters.exporter import is_file
from railbus.importers.image_bytes import pixels
from railbus.importers.source import Array
from railbus.reading_rows import as_numbers
from railbus_shared.contracts.artifacts import Column

Picture = npt.NDArray[np.uint8]
"""(H, W, 3)."""

_MAX_SIDE: Final = 4096
_GAP: Final = 4
_SHEET_WIDTH: Final = 800
_TILE: Final = 96
"""Small pictures are drawn about so large, by whole factors, so that each pixel stays one."""
_MAX_TILE: Final = 256


def is_picture(column: Column) -> bool:
    """Whether samples of a column can be looked at."""
    if is_file(column):
        return True
    shape = column.shape
    is_numbers = column.dtype in {"uint8", "float16", "bfloat16", "float32", "float64"}
    is_plane = len(shape) == 2 or (len(shape) == 3 and bool({shape[0], shape[2]} & {1, 3}))
    return is_numbers and not column.variable_length and is_plane and max(shape) <= _MAX_SIDE and min(shape[-2:]) > 0


def picture(value: Array, column: Column, *, name: str = "a sample") -> Picture:
    """A sample as red, green and blue; raises InvalidField for a file that is no image."""
    if is_file(column):
        return pixels(value.tobytes(), name=name)
    plane = as_numbers(value, column)
    if plane.ndim == 3 and plane.shape[0] in {1, 3}:
        plane = plane.transpose(1, 2, 0)
    if plane.dtype != np.uint8:
        low, high = np.nanmin(plane), np.nanmax(plane)
        scaled = plane if low >= 0 and high <= 1 else (plane - low) / max(high - low, np.finfo(np.float32).tiny)
        plane = (np.nan_to_num(scaled) * 255).round().astype(np.uint8)
    plane = plane if plane.ndim == 3 else plane[:, :, None]
    return np.ascontiguousarray(np.broadcast_to(plane, (*plane.shape[:2], 3)))


def contact_sheet(pictures: Sequence[Picture]) -> Picture:
    """All pictures in rows, on grey, each in a tile of one size."""
    tiles = [_fitted(one) for one in pictures]
    height, width = (max(tile.shape[axis] for tile in tiles) for axis in (0, 1))
    across = max(1, min(len(tiles), (_SHEET_WIDTH + _GAP) // (width + _GAP)))
    down = -(-len(tiles) // across)
    sheet = np.full((down * (height + _GAP) + _GAP, across * (width + _GAP) + _GAP, 3), 128, np.uint8)
    for at, tile in enumerate(tiles):
        top = _GAP + at // across * (height + _GAP) + (height - tile.shape[0]) // 2
        left = _GAP + at % across * (width + _GAP) + (width - tile.shape[1]) // 2
        sheet[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return sheet


def _fitted(one: Picture) -> Picture:
    """Small ones enlarged, large ones thinned out, both by whole factors."""
    side = max(one.shape[:2])
    if side > _MAX_TILE:
        step = -(-side // _MAX_TILE)
        return one[::step, ::step]
    factor = max(1, _TILE // side)
    return one.repeat(factor, axis=0).repeat(factor, axis=1)


def png(one: Picture) -> bytes:
    """A PNG file. Source: https://www.w3.org/TR/png-3/"""
    height, width, _ = one.shape
    head = np.array([width, height], ">u4").tobytes() + bytes([8, 2, 0, 0, 0])
    lines = np.concatenate([np.zeros((height, 1), np.uint8), one.reshape(height, width * 3)], axis=1)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(lines.tobytes(), 6)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_part(kind, data) for kind, data in parts)


def _part(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
