"""Loads weights alone into a model: of another checkpoint under the root, or of a file from elsewhere.

Out: the event `checkpoint.loaded`. What is loaded is proven first where it states a hash, and told with its hash in
any case; nothing is changed before it is known to fit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final, cast

import torch

from railbus_runner.checkpointing import fitting, loading, names
from railbus_runner.checkpointing.safetensors_file import open_safetensors
from railbus_runner.checkpointing.state_file import open_state
from railbus_runner.checkpointing.store import CheckpointStore
from railbus_runner.checkpointing.tensor_file import TensorFile
from railbus_runner.frames import Plan
from railbus_runner.recorder import Recorder
from railbus_shared.errors import CheckpointCorrupt, CheckpointNotFound, Conflict, NotSupported, shorten
from railbus_shared.layout import Layout

_HOW_TO_NAME: Final = "name one: 'checkpoint-000123' of this model, or 'MODEL/checkpoint-000123'"
_HOW_TO_MEND: Final = (
    "give the hash of the file that is meant, or fetch the file again; save files of old formats anew, and of a "
    "model that was pickled whole its state_dict()"
)


@dataclass(frozen=True)
class Selection:
    """Which weights are loaded, and what must be there.

    Attributes:
        only: patterns of names in the model, as of a shell.
        rename: beginnings of names in the source, and what they are in the model.
        strict: whether source and model must have the same names, among those that `only` selects.
    """

    only: tuple[str, ...] = ("*",)
    rename: Mapping[str, str] | None = None
    strict: bool = True


@dataclass(frozen=True)
class LoadedWeights:
    """What was loaded, under the names that the model has.

    Attributes:
        path: of the file.
        sha256: of all its bytes.
        loaded: names of the weights that have values from it now.
        missing: names in the model that it lacks.
        unexpected: names in it that the model lacks.
    """

    path: str
    sha256: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


class WeightLoader:
    """Loads for one job."""

    def __init__(self, plan: Plan, *, recorder: Recorder) -> None:
        self._plan = plan
        self._recorder = recorder

    def of_checkpoint(self, source: str, module: torch.nn.Module, *, part: str, selection: Selection) -> LoadedWeights:
        """Load from a part of `checkpoint-000123`, or of `model/checkpoint-000123` of another model.

        Raises CheckpointNotFound, CheckpointCorrupt, Conflict, InvalidName, ValueError.
        """
        model, _, stem = source.rpartition("/")
        store = CheckpointStore(
            Layout(Path(self._plan.root)),
            model or self._plan.spec.model,
            job=self._plan.job,
            lease_epoch=self._plan.lease_epoch,
        )
        try:
            meta = store.named(stem)
        except CheckpointNotFound as exc:
            hint = exc.hint if stem.startswith("checkpoint-") else _HOW_TO_NAME
            raise CheckpointNotFound(f"load() got {source!r}: there is no such checkpoint", hint=hint) from exc
        if meta.format != "torch":
            raise NotSupported(
                f"load() got {source!r}: it is spread over several files",
                hint=f"load_foreign what `railbus checkpoints consolidate {meta.model} {meta.number} --pt FILE` makes",
            )
        with loading.open_checkpoint(store.folder, meta, live=lambda meta: meta.tensors) as opened:
            saved = _inner(opened.state, ("parts", part), source, is_file=False)
            loaded = load_weights(module, saved, cast("TensorFile", opened.file), selection)
        self._tell(loaded, model=meta.model, checkpoint=stem, from_job=meta.job, step=meta.step)
        return loaded

    def of_file(
        self, path: Path, module: torch.nn.Module, *, sha256: str | None, key: str, selection: Selection
    ) -> LoadedWeights:
        """Load from a file of safetensors or of `torch.save`; raises CheckpointNotFound, Conflict, ValueError."""
        path = path.absolute()
        try:
            with _open_foreign(path, sha256) as file:
                saved = _inner(file.state, tuple(key.split(".")) if key else (), str(path), is_file=True)
                loaded = load_weights(module, saved, file, selection)
        except CheckpointCorrupt as exc:
            raise Conflict(
                f"{str(path)!r} is not what was asked for: expected {exc.details['expected']}, "
                f"found {exc.details['actual']}",
                hint=_HOW_TO_MEND,
                details=exc.details,
            ) from exc
        self._tell(loaded)
        return loaded

    def _tell(self, loaded: LoadedWeights, **data: object) -> None:
        differing = {"missing": loaded.missing, "unexpected": loaded.unexpected}
        self._recorder.record(
            "checkpoint.loaded",
            data={
                **data,
                "path": loaded.path,
                "sha256": loaded.sha256,
                "loaded": len(loaded.loaded),
                **{what: len(found) for what, found in differing.items()},
                **{f"{what}_names": list(found[: fitting.MAX_NAMED]) for what, found in differing.items()},
            },
        )


def load_weights(
    module: torch.nn.Module, saved: Mapping[str, Any], file: TensorFile, selection: Selection
) -> LoadedWeights:
    """Read weights into a model; one floating dtype may become another.

    Raises Conflict, before anything has changed, for what does not fit, ValueError for a selection of nothing, and
    NotSupported for a model whose tensors are spread over ranks.
    """
    _check_whole(module)
    mine = fitting.for_model(module, _renamed(saved, selection.rename or {}))
    is_wanted = _matcher(selection.only)
    wanted = {name: value for name, value in mine.items() if is_wanted(names.plain_name(name))}
    difference = fitting.model_difference(module, wanted, may_cast=True)
    missing = tuple(name for name in difference.missing if is_wanted(name))
    loaded = {name: value for name, value in wanted.items() if names.plain_name(name) not in difference.unexpected}
    _check(fitting.Difference(missing, difference.unexpected, difference.other), loaded, saved, selection)
    for name in set(mine) - set(loaded):
        del mine[name]
    placements = list(fitting.place_model(module, mine, file))
    file.fill(mine, placements)
    said = names.unwrapped(module).load_state_dict(mine, strict=False)
    found = (names.plain_name(name) for name in getattr(said, "missing_keys", ()))  # by a model that translates names
    missing += tuple(name for name in found if is_wanted(name) and name not in missing)
    return LoadedWeights(
        path=str(file.path),
        sha256=file.sha256,
        loaded=tuple(names.plain_name(name) for name in loaded),
        missing=missing,
        unexpected=difference.unexpected,
    )


def _check(
    difference: fitting.Difference, loaded: Mapping[str, Any], saved: Mapping[str, Any], selection: Selection
) -> None:
    told = difference if selection.strict else fitting.Difference(other=difference.other)
    if told:
        raise Conflict(
            f"the weights do not fit the model: {told}",
            hint="select what fits by only=, translate names by rename=, or take what is there by strict=False",
            details={"difference": str(told)},
        )
    if not loaded:
        raise ValueError(
            f"load() selects nothing by only={selection.only} and rename={selection.rename}: "
            f"the source has {shorten(list(saved))}"
        )


def _renamed(saved: Mapping[str, Any], rename: Mapping[str, str]) -> Mapping[str, Any]:
    """Of several beginnings that fit a name the longest counts; one that fits none is a mistake."""
    beginnings = sorted(rename, key=len, reverse=True)
    if unused := [old for old in beginnings if not any(name.startswith(old) for name in saved)]:
        raise ValueError(f"rename: no name begins with {unused[0]!r}; the source has {shorten(list(saved))}")

    def name_here(name: str) -> str:
        old = next((old for old in beginnings if name.startswith(old)), "")
        return rename[old] + name.removeprefix(old) if old else name

    return names.renamed(saved, name_here) if rename else saved


def _matcher(patterns: Sequence[str]) -> Callable[[str], bool]:
    return lambda name: any(fnmatchcase(name, pattern) for pattern in patterns)


def _inner(state: object, keys: Sequence[str], source: str, *, is_file: bool) -> Mapping[str, Any]:
    """The map of weights that lies under some keys; raises ValueError naming the keys that there are."""
    for key in keys:
        if not isinstance(state, dict) or key not in state:
            raise ValueError(f"{source} has no {'.'.join(keys)!r}: {_keys(state)}")
        state = state[key]
    if not isinstance(state, dict) or not any(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(
            f"{source} holds no map of weights at {'.'.join(keys) or 'its top'!r}: {_keys(state)}; "
            f"say where they lie by {'key' if is_file else 'part'}="
        )
    return state


def _keys(state: object) -> str:
    return f"there is {shorten(list(state))}" if isinstance(state, dict) else f"there is a {type(state).__name__}"


def _check_whole(module: torch.nn.Module) -> None:
    from railbus_runner.checkpointing.spread import is_spread  # noqa: PLC0415 - few need it

    if is_spread(module.state_dict()):
        raise NotSupported(
            "load() got a model whose tensors are spread over ranks",
            hint="load whole weights on every rank, and call fully_shard then",
        )


def _open_foreign(path: Path, sha256: str | None) -> TensorFile:
    try:
        with path.open("rb") as file:
            is_zip = file.read(2) == b"PK"
    except FileNotFoundError as exc:
        raise CheckpointNotFound(
            f"load_foreign() got {str(path)!r}: there is no such file",
            hint="give the path as it is on the host that trains",
        ) from exc
    except OSError as exc:
        raise CheckpointNotFound(
            f"load_foreign() got {str(path)!r}: {os.strerror(exc.errno or 0)}",
            hint="give a plain file that the user of the runner may read",
        ) from exc
    return open_state(path, sha256=sha256) if is_zip else open_safetensors(path, sha256=sha256)
