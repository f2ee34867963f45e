"""Folders of images, one for each class: `cats/1.jpg`, `dogs/2.png`; or such folders under `train` and `test`.

Files are kept as they are, so that nothing is lost and nothing grows: column `image` is the file's bytes, `label` its
folder's number, `height` and `width` its size. `--decode WxH` keeps pixels of one size instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np

from railbus.importers.image_bytes import MIXED, look, pixels
from railbus.importers.joined import Joined, split_folders
from railbus.importers.source import Array, Chunk, Options, Outline, Source, ragged_bytes, rows_per_chunk, unreadable
from railbus_shared.contracts.artifacts import Column
from railbus_shared.data.order import Positions

SUFFIXES: Final = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"})
_MAX_FILE_BYTES: Final = 256 << 20
_REPORT_FILES: Final = 100


def is_image_folder(folder: Path) -> bool:
    """Whether there are images in the folders of a folder, or in theirs."""
    return any(_first_image(one) for parent in (split_folders(folder).values() or [folder]) for one in _folders(parent))


def image_folder(folder: Path, options: Options) -> Source:
    """The images in a folder of classes, or of splits with classes."""
    parts = split_folders(folder)
    if not parts:
        return ImageFolder(folder, _class_names(folder), options)
    names = sorted({name for part in parts.values() for name in _class_names(part)})
    return Joined({name: ImageFolder(part, names, options) for name, part in parts.items()})


class ImageFolder:
    """Images by class, in the order of class and file name."""

    def __init__(self, folder: Path, classes: list[str], options: Options) -> None:
        """Looks at every file. Raises InvalidField for one that is no image, ConfigError without Pillow."""
        self._options = options
        found = [(path, number) for number, name in enumerate(classes) for path in _files(folder / name)]
        self._paths = [path for path, _ in found if path.suffix.lower() in SUFFIXES]
        if not self._paths:
            raise unreadable(folder.name, "there are no images in its folders", hint="give a folder for each class")
        labels = [number for path, number in found if path.suffix.lower() in SUFFIXES]
        left_out = len(found) - len(self._paths)
        self._labels = np.array(labels, np.int64)
        sizes, encodings, num_bytes = self._look()
        self._sizes = sizes
        size = options.decode
        encoding = encodings.pop() if len(encodings) == 1 else MIXED
        columns = {
            "image": Column(dtype="uint8", shape=(size[1], size[0], 3), description="Red, green, blue.")
            if size
            else Column(dtype="uint8", shape=(), variable_length=True, encoding=encoding),
            "label": Column(dtype="int64", shape=(), num_classes=len(classes), labels=tuple(classes)),
            "height": Column(dtype="int32", shape=(), description="Of the file, in pixels."),
            "width": Column(dtype="int32", shape=(), description="Of the file, in pixels."),
        }
        self.outline = Outline(
            columns=columns,
            samples=len(self._paths),
            sample_bytes=size[0] * size[1] * 3 if size else num_bytes // len(self._paths),
            notes=(f"left out {left_out} files that are no images",) if left_out else (),
        )

    def _look(self) -> tuple[Array, set[str], int]:
        """Heights and widths (N, 2), the formats that there are, and bytes in all."""
        sizes = np.empty((len(self._paths), 2), np.int32)
        encodings: set[str] = set()
        total = 0
        for at, path in enumerate(self._paths):
            data = _data(path)
            looks = look(data, name=_shown(path))
            sizes[at] = looks.height, looks.width
            encodings.add(looks.encoding)
            total += len(data)
            if at % _REPORT_FILES == 0:
                self._options.report("looking", at, len(self._paths))
        return sizes, encodings, total

    def chunks(self) -> Iterator[Chunk]:
        step = rows_per_chunk(self.outline.sample_bytes)
        for start in range(0, self.outline.samples, step):
            yield self.take(np.arange(start, min(start + step, self.outline.samples), dtype=np.int64))

    def take(self, rows: Positions) -> Chunk:
        paths = [self._paths[row] for row in rows.tolist()]
        size = self._options.decode
        images = (
            np.stack([pixels(_data(path), name=_shown(path), size=size) for path in paths])
            if size
            else ragged_bytes([_data(path) for path in paths])
        )
        return {
            "image": images,
            "label": self._labels[rows],
            "height": self._sizes[rows, 0],
            "width": self._sizes[rows, 1],
        }


def _folders(folder: Path) -> list[Path]:
    """Plain folders in a folder; what begins with a dot is somebody's own, and a link could lead in a circle."""
    try:
        found = sorted(folder.iterdir())
    except PermissionError:
        return []
    return [path for path in found if path.is_dir() and not path.is_symlink() and not path.name.startswith(".")]


def _class_names(folder: Path) -> list[str]:
    return [path.name for path in _folders(folder) if _first_image(path)]


def _first_image(folder: Path) -> Path | None:
    return next((path for path in _files(folder) if path.suffix.lower() in SUFFIXES), None)


def _files(folder: Path) -> list[Path]:
    try:
        found = sorted(folder.iterdir())
    except (PermissionError, FileNotFoundError):
        return []
    return [path for path in found if path.is_file() and not path.name.startswith(".")]


def _data(path: Path) -> bytes:
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise unreadable(_shown(path), f"it is larger than {_MAX_FILE_BYTES} bytes")
    return path.read_bytes()


def _shown(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"
