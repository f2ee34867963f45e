"""Which importer a file or folder is for, by its name and by what lies in it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from railbus.importers.arrays import npy_file, npy_folder, npz_file
from railbus.importers.arrow_files import is_saved_dataset, parquet_file, parquet_folder, saved_dataset
from railbus.importers.bpe import BpeText
from railbus.importers.builtin_data import BUILTIN
from railbus.importers.byte_text import ByteText
from railbus.importers.characters import character_file
from railbus.importers.csv_files import CsvFile
from railbus.importers.image_folder import image_folder, is_image_folder
from railbus.importers.json_lines import JsonLines
from railbus.importers.mds import is_mds, mds_folder
from railbus.importers.source import Options, Source
from railbus.importers.webdataset import WebDataset, archive_folder, is_archive
from railbus_shared.errors import InvalidField, NotFound

FORMATS: Final = (".npy", ".npz", ".csv", ".txt", ".md", ".jsonl", ".parquet", ".tar")
FOLDERS: Final = "images by class, .npy, .parquet or .tar files, a Hugging Face dataset, MosaicML MDS"


def checked_path(source: str) -> Path:
    """The file or folder that is meant; raises NotFound, InvalidField if it may not be read."""
    path = Path(source)
    if not source or not (path.is_file() or path.is_dir()):
        raise _not_found(source, "there is no such file or folder")
    if not os.access(path, os.R_OK):
        raise InvalidField(field="source", value=source, problem="this user may not read it")
    return path


def _not_found(source: str, problem: str) -> NotFound:
    return NotFound(
        f"source has value {source!r}: {problem}",
        hint=f"give a file ({', '.join(FORMATS)}), a folder ({FOLDERS}) or one of {', '.join(BUILTIN)}",
        details={"field": "source", "value": source},
    )


def opened(path: Path, options: Options) -> Source:
    """The source at a path; raises InvalidField for one that cannot be read, NotFound for a folder of nothing."""
    return _folder(path, options) if path.is_dir() else _file(path, options)


def _file(path: Path, options: Options) -> Source:
    if is_archive(path):
        return WebDataset([path], options)
    suffix = path.suffix.lower()
    if suffix not in _BY_SUFFIX:
        raise InvalidField(
            field="source",
            value=path.name,
            problem=f"format {suffix!r} is not known",
            hint=f"known formats: {', '.join(FORMATS)}",
        )
    return _BY_SUFFIX[suffix](path, options)


def _text(path: Path, options: Options) -> Source:
    match options.tokenizer:
        case "char":
            return character_file(path, options)
        case "byte":
            return ByteText(path, options)
        case "bpe":
            return BpeText(path, options)


_BY_SUFFIX: Final[Mapping[str, Callable[[Path, Options], Source]]] = {
    ".npy": lambda path, _: npy_file(path),
    ".npz": npz_file,
    ".csv": CsvFile,
    ".jsonl": JsonLines,
    ".ndjson": JsonLines,
    ".parquet": parquet_file,
    ".txt": _text,
    ".md": _text,
}


def _folder(path: Path, options: Options) -> Source:
    if is_mds(path):
        return mds_folder(path, options)
    if is_saved_dataset(path):
        return saved_dataset(path, options)
    names = [one.name.lower() for one in path.iterdir()]
    if any(name.endswith(".parquet") for name in names):
        return parquet_folder(path, options)
    if any(is_archive(Path(name)) for name in names):
        return archive_folder(path, options)
    if any(name.endswith(".npy") for name in names):
        return npy_folder(path)
    if is_image_folder(path):
        return image_folder(path, options)
    raise _not_found(str(path), "the folder holds nothing that can be imported")
