"""The bytes of a checkpoint whose tensors are spread over several ranks: a folder, to which every rank writes its part.

    checkpoint-000123.dcp/
    ├── .metadata             where which piece of which tensor lies, by `torch.distributed.checkpoint`
    ├── common.pt             everything else: an ordinary file of `torch.save`, with a mark for each spread tensor
    └── __<rank>_<n>.distcp   the pieces of one rank

What is spread are tensors that are a `DTensor` (FSDP2, tensor parallelism). The pieces are read back into tensors that
may be spread otherwise, or not at all. Nothing is read before its hash is proven; then `common.pt` and the pieces are
unpickled with `weights_only`, and `.metadata`, which is a pickle of classes of PyTorch, by an unpickler that knows
those classes and nothing else.

The functions that take a `Team` are called by all of its ranks.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from railbus_runner.checkpointing.spread import State, put_together, take_apart, whole
from railbus_runner.team import Team
from railbus_shared import files
from railbus_shared.contracts.artifacts import CheckpointFile, CheckpointMeta
from railbus_shared.errors import CheckpointCorrupt, RailbusError, StorageFull, error_from_wire
from railbus_shared.layout import checkpoint_stem

T = TypeVar("T")

METADATA: Final = ".metadata"
COMMON: Final = "common.pt"
# --- writing ---------------------------------------------------------------------------------------------------------


def write_parts(folder: Path, state: State, *, final: str, team: Team) -> tuple[CheckpointFile, ...]:
    """Write a state into an empty folder, durably; gives its files as they are to stand in the meta, `.metadata` first.

    `final` is the name that the folder is to have. Every rank writes and hashes its own part; rank 0 writes `common.pt`
    too. Raises on every rank what went wrong on any: StorageFull, before a byte is written if that can be known.
    """
    common, tensors = take_apart(state)
    own_bytes = sum(_local_bytes(tensor) for tensor in tensors.values())
    needed_bytes = sum(team.gathered(own_bytes))

    def begin() -> None:
        if team.is_leader:
            _check_room(folder, needed_bytes)
            _write_common(folder, common)

    alike(team, begin)
    with _only_own_errors():
        save(
            tensors,
            storage_writer=_Writer(folder, single_file_per_rank=True, sync_files=True),
            process_group=team.group,
            no_dist=team.group is None,
        )
    hashed = alike(team, lambda: _hash_own(folder, team.rank, final=final))
    return tuple(file for own in team.gathered([file.to_map() for file in hashed]) for file in map(_file, own))


def publish_folder(draft: Path, final: Path) -> None:
    """Give a folder its final name; its number is claimed, so nobody else has it."""
    files.fsync_dir(draft)
    draft.rename(final)
    files.fsync_dir(final.parent)


def parts_path(folder: Path, number: int) -> Path:
    """Where the parts of a checkpoint lie; `folder` is that of its meta."""
    return folder / f"{checkpoint_stem(number)}.dcp"


class _Writer(FileSystemWriter):
    """Says a full disk by its name; torch hides it behind its own complaint, and what hid it does not reach rank 0."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        with _disk_errors(Path(self.path)):
            return super().write_data(plan, planner)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        with _disk_errors(Path(self.path)):
            super().finish(metadata, results)


def _write_common(folder: Path, common: dict[str, object]) -> None:
    with _disk_errors(folder), (folder / COMMON).open("xb") as file:
        torch.save(common, file)
        file.flush()
        os.fsync(file.fileno())


def _check_room(folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise StorageFull(
            f"a checkpoint of {needed_bytes:,} bytes does not fit into {str(folder.parent)!r}, which has {free:,} left",
            hint="free space or move the root; nothing older was touched",
        )


def _hash_own(folder: Path, rank: int, *, final: str) -> list[CheckpointFile]:
    names = sorted(path.name for path in folder.glob(f"__{rank}_*.distcp"))
    if rank == 0:
        names = [METADATA, COMMON, *names]
    return [
        CheckpointFile(
            file=f"{final}/{name}", bytes=(folder / name).stat().st_size, sha256=files.sha256_file(folder / name)
        )
        for name in names
    ]


def _file(described: Mapping[str, object]) -> CheckpointFile:
    return CheckpointFile.parse(dict(described))


def _local_bytes(tensor: torch.Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    with files.storage_errors(path):
        try:
            yield
        except RuntimeError as exc:
            if isinstance(exc.__context__, OSError):
                raise exc.__context__ from None
            raise


# --- reading ---------------------------------------------------------------------------------------------------------


def verify_files(folder: Path, expected: Collection[CheckpointFile], *, team: Team) -> RailbusError | None:
    """What is wrong with the files of a checkpoint, on every rank the same; each rank hashes a share of them.

    `folder` is that of the meta.
    """
    share = sorted(expected, key=lambda file: -file.bytes)[team.rank :: team.world_size]
    try:
        for file in share:
            _verify(folder / file.file, file)
        error = None
    except CheckpointCorrupt as exc:
        error = exc.to_wire()
    return next((error_from_wire(one) for one in team.gathered(error) if one is not None), None)


def load_whole(folder: Path, meta: CheckpointMeta) -> dict[str, object]:
    """The state of a checkpoint as one rank alone has it: no tensor is spread. Raises CheckpointCorrupt."""
    alone, parts = Team(), parts_path(folder, meta.number)
    if (error := verify_files(folder, meta.files, team=alone)) is not None:
        raise error
    state, tensors = put_together(read_common(parts), target=whole)
    read_parts(parts, tensors, proven=meta.files, team=alone)
    return state


def read_common(folder: Path) -> dict[str, object]:
    """What is not spread; its hash must have been proven. Raises CheckpointCorrupt if it is no state."""
    try:
        return cast("dict[str, object]", torch.load(folder / COMMON, map_location="cpu", weights_only=True))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, OSError) as exc:
        raise CheckpointCorrupt(
            path=str(folder / COMMON), expected="tensors and plain containers", actual=str(exc)
        ) from exc


def read_parts(
    folder: Path, tensors: dict[str, torch.Tensor], *, proven: Collection[CheckpointFile], team: Team
) -> None:
    """Fill tensors with what is stored under their names; raises CheckpointCorrupt on every rank if any cannot."""
    names = {file.file.partition("/")[2] for file in proven}
    try:
        with _only_own_errors():
            load(
                cast("dict[str, Any]", tensors),
                storage_reader=_Reader(folder, proven=names),
                process_group=team.group,
                no_dist=team.group is None,
            )
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AssertionError, OSError) as exc:
        raise CheckpointCorrupt(path=str(folder), expected="the pieces of every tensor", actual=str(exc)) from exc


class _Reader(FileSystemReader):
    """Reads from files whose hash is proven, and unpickles no class but those that `.metadata` is made of."""

    def __init__(self, folder: Path, *, proven: Collection[str]) -> None:
        super().__init__(folder)
        self._proven = proven

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        with (Path(self.path) / METADATA).open("rb") as file:
            metadata = cast("Metadata", _Unpickler(file).load())
        foreign = {info.relative_path for info in metadata.storage_data.values()} - set(self._proven)
        if foreign:
            raise ValueError(f"it names files that its meta does not: {sorted(foreign)[0]!r}")
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


class _Unpickler(pickle.Unpickler):
    """Knows the classes that a `.metadata` is made of; raises UnpicklingError for any other."""

    _KNOWN: Final = {
        "torch.distributed.checkpoint.metadata": {
            *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties"),
            *("ChunkStorageMetadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "collections": {"OrderedDict"},
        "pathlib": {"PosixPath", "Path"},
    }

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype))
        if is_dtype or name in self._KNOWN.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{METADATA} names {module}.{name}, which has no place in it")


def _verify(path: Path, expected: CheckpointFile) -> None:
    try:
        size = path.stat().st_size
        if size != expected.bytes:
            raise CheckpointCorrupt(path=str(path), expected=f"{expected.bytes} bytes", actual=f"{size} bytes")
        digest = files.sha256_file(path)
    except OSError as exc:
        raise CheckpointCorrupt(path=str(path), expected=f"{expected.bytes} bytes", actual=str(exc)) from exc
    if digest != expected.sha256:
        raise CheckpointCorrupt(path=str(path), expected=f"sha256 {expected.sha256}", actual=f"sha256 {digest}")


# --- together --------------------------------------------------------------------------------------------------------


def alike(team: Team, work: Callable[[], T]) -> T:
    """What `work` gives, where it went well on every rank; else the same error on every rank."""
    result: list[T] = []
    error: dict[str, object] | None = None
    try:
        result.append(work())
    except RailbusError as exc:
        error = exc.to_wire()
    for one in team.gathered(error):
        if one is not None:
            raise error_from_wire(one)
    return result[0]


@contextlib.contextmanager
def _only_own_errors() -> Iterator[None]:
    """The first error of ours among those of the ranks, instead of the collection that PyTorch makes of them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as exc:
            errors = [error for error, _ in exc.failures.values()]
            own = next((error for error in errors if isinstance(error, RailbusError)), None)
            raise own or errors[0] from exc
