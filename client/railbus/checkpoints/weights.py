"""A checkpoint's tensors as one file of safetensors: verified before, streamed, whole or not at all.

The format is eight bytes of little-endian header length, a JSON header, and the tensors without gaps between them. It
has no place for two names of one tensor: of tied weights one name is kept, the first in the alphabet as the library
itself does, and the header's metadata says for each other name which one that is.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, Final

import orjson

from railbus.checkpoints.catalogue import Checkpoint
from railbus.checkpoints.dtypes import ITEM_BYTES, SAFETENSORS_DTYPES
from railbus.checkpoints.one_file import as_one_file
from railbus.checkpoints.proof import Report, silent, verified
from railbus.checkpoints.tensors import PARTS, Contents, Tensor, contents, read
from railbus_shared import files
from railbus_shared.errors import Conflict, InvalidField, NotSupported

_ALIGN_BYTES: Final = 8
_SHOWN: Final = 8


@dataclass(frozen=True)
class Exported:
    """What was written."""

    path: Path
    num_tensors: int
    num_bytes: int
    """Of the file."""
    sha256: str
    """Of the file."""
    tied: dict[str, str]
    """Names that were left out, each with the one under which its tensor is kept."""


@dataclass(frozen=True)
class Wish:
    """Which tensors are wanted, and under which names."""

    part: str | None = "model"
    """What was tracked under this name, without its prefix; None for everything, under the names of the state."""
    patterns: tuple[str, ...] = ()
    """As in a shell, for instance `encoder.*`; a tensor that any of them fits is taken. All if empty."""


def export_safetensors(one: Checkpoint, target: Path, wish: Wish, *, report: Report = silent) -> Exported:
    """Write tensors of a checkpoint; the same ones give the same bytes.

    No more than some megabytes are in memory, but of a sharded one, which is put together before, once all of it.

    Args:
        one: the checkpoint; every file of it is hashed before.
        target: of the file; it must not exist.
        wish: which tensors.
        report: is told of progress.

    Raises Conflict if the target exists, InvalidField if nothing is wanted, NotSupported for a tensor that has no place
    in the format, CheckpointCorrupt, StorageFull.
    """
    if target.exists() or target.is_symlink():
        raise Conflict(f"target has value {str(target)!r}: it exists", hint="name a new one; nothing is overwritten")
    folder = _folder_of(target)
    with as_one_file(one, beside=folder) as whole, verified(whole, report=report) as file:
        wanted = chosen(contents(whole, file), wish)
        kept, tied = untied(wanted)
        header = _header(kept, _metadata(one, wish) | tied)
        with files.storage_errors(target):
            num_bytes, sha256 = _write(target, _pieces(header, file, kept, report))
    return Exported(target, len(kept), num_bytes, sha256, tied)


def chosen(found: Contents, wish: Wish) -> dict[str, Tensor]:
    """The tensors that are wished for, by the names that they get; raises InvalidField, NotSupported."""
    part = found.part(wish.part) if wish.part is not None else found
    prefix = f"{PARTS}{wish.part}." if wish.part is not None else ""
    names = {name.removeprefix(prefix): name for name in part.names}
    if not names:
        raise InvalidField(field="part", value=wish.part, problem="the checkpoint has no tensors of it",
                           hint=f"there are: {', '.join(found.parts) or 'none'}")  # fmt: skip
    wanted = {new: old for new, old in names.items() if not wish.patterns or _fits(new, wish.patterns)}
    if not wanted:
        raise InvalidField(field="only", value=list(wish.patterns), problem="no tensor has such a name",
                           hint=f"some are: {', '.join(list(names)[:_SHOWN])}")  # fmt: skip
    for new, old in wanted.items():
        tensor = found.tensors.get(old)
        if tensor is None or tensor.dtype not in SAFETENSORS_DTYPES:
            form = tensor.form if tensor is not None else "not dense"
            raise NotSupported(
                f"tensor {new!r} is {form}, which safetensors cannot hold", hint="choose others with --only or --part"
            )
    return {new: found.tensors[old] for new, old in wanted.items()}


def untied(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors with one name for each, in the order in which they are written; and the names that others stand for.

    Large elements first, so that each tensor begins on a multiple of its element's size.
    """
    kept: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    names: dict[tuple[object, ...], str] = {}
    for name in sorted(tensors):
        one = tensors[name]
        place = (one.offset, one.dtype, one.shape, one.strides)
        first = names.setdefault(place, name) if one.num_bytes else name
        if first == name:
            kept[name] = one
        else:
            tied[name] = first
    order = sorted(kept, key=lambda name: (-ITEM_BYTES[kept[name].dtype], name))
    return {name: kept[name] for name in order}, tied


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _metadata(one: Checkpoint, wish: Wish) -> dict[str, str]:
    """The chain that the tensors come from; `format` is what other programs look for."""
    meta = one.meta
    said = {
        "model": meta.model,
        "checkpoint": one.name,
        "part": wish.part,
        "step": meta.step,
        "job": meta.job,
        "entrypoint": meta.entrypoint,
        "git_commit": meta.git_commit,
        "dataset": meta.dataset,
        "index_sha256": meta.index_sha256,
        "spec_sha256": meta.spec_sha256,
        "model_schema_sha256": meta.model_schema_sha256,
        "parent_sha256": meta.parent_sha256,
        "meta_sha256": one.meta_sha256,
        "sha256": meta.files[0].sha256 if len(meta.files) == 1 else None,
        "written": meta.created_at,
    }
    return {"format": "pt"} | {f"railbus.{key}": str(value) for key, value in said.items() if value is not None}


def _header(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, one in tensors.items():
        begin, end = end, end + one.num_bytes
        entries[name] = {"dtype": SAFETENSORS_DTYPES[one.dtype], "shape": one.shape, "data_offsets": [begin, end]}
    text = orjson.dumps(entries)
    text += b" " * (-len(text) % _ALIGN_BYTES)
    return len(text).to_bytes(8, "little") + text


def _pieces(header: bytes, file: BufferedReader, tensors: dict[str, Tensor], report: Report) -> Iterator[memoryview]:
    yield memoryview(header)
    total, done = sum(one.num_bytes for one in tensors.values()), 0
    for one in tensors.values():
        for piece in read(file, one):
            yield piece.data
            done += piece.size
            report("export", done, total)


def _folder_of(target: Path) -> Path:
    """Made where there is none."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as exc:
        raise InvalidField(field="target", value=str(target), problem=f"no folder for it: {exc.strerror}") from exc
    return target.parent


def _write(target: Path, pieces: Iterator[memoryview]) -> tuple[int, str]:
    """Write a new file whole, and give its size and hash; raises Conflict if somebody was quicker."""
    hidden = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    digest = hashlib.sha256()
    try:
        with os.fdopen(os.open(hidden, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644), "wb") as out:
            num_bytes = _fill(out, pieces, digest)
        files.publish(hidden, target)
    except FileExistsError as exc:
        raise Conflict(f"target has value {str(target)!r}: it exists", hint="name a new one") from exc
    finally:
        hidden.unlink(missing_ok=True)
    return num_bytes, digest.hexdigest()


def _fill(out: BinaryIO, pieces: Iterator[memoryview], digest: hashlib._Hash) -> int:
    num_bytes = 0
    for piece in pieces:
        out.write(piece)
        digest.update(piece)
        num_bytes += piece.nbytes
    out.flush()
    os.fsync(out.fileno())
    return num_bytes
