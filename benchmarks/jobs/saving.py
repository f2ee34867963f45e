"""Jobs that measure checkpoints in a real trainer: railbus's own and those of others in turns, on the same state.

railbus saves as it does for everybody: `ctx.step` writes a checkpoint because the job's policy wants one after so many
steps. It is durable when its meta has its name, for by that a checkpoint exists.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import psutil
import torch
from large_state import Buffer, Training, tensors_of
from other_savers import IsDurable, Limits, Loaders, Savers, evict, until

from railbus import TrainContext
from railbus_shared.contracts.model import Contract
from railbus_shared.layout import Layout, checkpoint_number, checkpoint_stem

EVERY_STEPS: Final = 64
"""Of the policy; the jobs take idle steps until the next one is due."""
AT_START: Final = "disk, at a start"
"""Where the optimizer has no state yet, as in every attempt that goes on."""
_LOOP_STEPS: Final = 6
_SETTLE_S: Final = 0.2
_WARM_S: Final = 60.0

Save = Callable[[], IsDurable]
Seconds = Mapping[str, list[float]]


class Params(Contract):
    """What main asks for."""

    root: str
    model: str
    folder: str
    """Where everything but railbus's checkpoints goes; on the same disk."""
    mode: str
    rounds: int = 5
    tiny: bool = False


class Ours:
    """Checkpoints that the policy asks for."""

    def __init__(self, ctx: TrainContext, params: Params) -> None:
        self._ctx = ctx
        self.folder = Layout(Path(params.root)).checkpoints(params.model)

    def align(self) -> None:
        """Go on until the next step is one that saves."""
        while (self._ctx.global_step + 1) % EVERY_STEPS:
            self._ctx.step()

    def warm_up(self) -> None:
        """Save until a checkpoint is written beside the loop, which takes an arena that is all there."""
        until_s = time.monotonic() + _WARM_S
        while time.monotonic() < until_s:
            self.align()
            is_durable = self.save()
            if not is_durable():
                until(is_durable)
                return
            time.sleep(_SETTLE_S)
        raise AssertionError(f"no checkpoint was written beside the loop in {_WARM_S:g} s")

    def save(self, **metrics: object) -> IsDurable:
        """The step that saves; `align` comes before."""
        meta = self.folder / f"{checkpoint_stem(self.newest + 1)}.meta.json"
        self._ctx.step(**metrics)
        return meta.exists

    @property
    def newest(self) -> int:
        """The highest number; 0 if there is none."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []  # noqa: PTH208 - bare names
        return max(filter(None, map(checkpoint_number, names)), default=0)

    @property
    def file(self) -> Path:
        return self.folder / f"{checkpoint_stem(self.newest)}.pt"

    def assert_holds(self, buffer: Buffer) -> None:
        """The newest file opens as any other of torch, and its tensors are those that were copied, bit by bit."""
        loaded = torch.load(self.file, weights_only=True, mmap=True)["parts"]
        found = [loaded["model"], loaded["optimizer"]]
        assert buffer.equals(list(tensors_of(found))), f"{self.file} does not hold what was saved"


def _begun(ctx: TrainContext) -> tuple[Params, Training, Ours]:
    params = ctx.params_as(Params)
    training = Training.begun(tiny=params.tiny)
    ctx.track(model=training.model, optimizer=training.optimizer)
    ctx.resume()
    ours = Ours(ctx, params)
    ours.warm_up()
    return params, training, ours


# --- a state that stands still --------------------------------------------------------------------------------------


def still(ctx: TrainContext) -> None:
    """How long a loop stands while its state is saved, and how long until that is durable."""
    params, training, ours = _begun(ctx)
    buffer = Buffer(training.tensors())
    limits = Limits(training, buffer, Path(params.folder))
    savers = Savers(training, Path(params.folder))
    stalls, durables = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    saves: dict[str, Save] = {
        "railbus": ours.save,
        "torch.save": savers.torch_save,
        "safetensors": savers.safetensors,
        "DCP save": savers.dcp_save,
        "DCP async, default stager": savers.dcp_async_default,
        "DCP async, shared stager": savers.dcp_async_shared,
    }
    for _ in range(params.rounds + 1):  # the first one touches memory, and does not count
        for name, limit in {"copy": limits.copy, "hash": limits.hash, "write": limits.write}.items():
            stalls[name].append(_seconds(limit))
        for name, save in saves.items():
            ours.align()
            time.sleep(_SETTLE_S)
            began = time.perf_counter()
            is_durable = save()
            stalls[name].append(time.perf_counter() - began)
            until(is_durable)
            durables[name].append(time.perf_counter() - began)
            if name == "railbus":
                ours.assert_holds(buffer)
            savers.clean()
    savers.close()
    buffer.fill(training.tensors())
    ours.align()
    is_durable = ours.save()
    training.change()
    until(is_durable)
    ours.assert_holds(buffer)
    tensors = training.tensors()
    ctx.event(
        "measured",
        stall_s=_counted(stalls),
        durable_s=_counted(durables),
        bytes=sum(tensor.nbytes for tensor in tensors),
        tensors=len(tensors),
        parameters=sum(parameter.numel() for parameter in training.model.parameters()),
        threads=torch.get_num_threads(),
    )


# --- a loop that trains ----------------------------------------------------------------------------------------------


def looping(ctx: TrainContext) -> None:
    """How much longer a loop takes because one save falls into it, the steps that the save slows down included.

    What a step takes without a save is measured before and after each, for others may be at work on the machine.
    """
    params, training, ours = _begun(ctx)
    savers = Savers(training, Path(params.folder))
    buffer = Buffer(training.tensors())
    saves: dict[str, Save] = {
        "railbus": ours.save,
        "torch.save": savers.torch_save,
        "DCP async, shared stager": savers.dcp_async_shared,
    }
    extras, steps = defaultdict[str, list[float]](list), list[float]()
    for _ in range(params.rounds + 1):
        for name, save in saves.items():
            before_s = _step_s(ctx, training)
            ours.align()
            taken, seconds = _steps(ctx, training, save=save)
            savers.clean()
            step_s = (before_s + _step_s(ctx, training)) / 2
            extras[name].append(seconds - taken * step_s)
            steps.append(step_s)
    savers.close()
    ours.align()
    _steps(ctx, training, save=lambda: _copied(training, buffer, ours))
    ours.assert_holds(buffer)
    ctx.event("measured", extra_s=_counted(extras), step_s=[round(step_s, 4) for step_s in steps[len(saves) :]])


def _copied(training: Training, buffer: Buffer, ours: Ours) -> IsDurable:
    buffer.fill(training.tensors())
    return ours.save()


def _step_s(ctx: TrainContext, training: Training) -> float:
    """Of a step while nothing is saved."""
    taken, seconds = _steps(ctx, training, save=None)
    return seconds / taken


def _steps(ctx: TrainContext, training: Training, *, save: Save | None) -> tuple[int, float]:
    """Train for some steps, and on until the save is durable that follows the first; gives steps and seconds."""
    is_durable: IsDurable | None = None
    began = time.perf_counter()
    for taken in itertools.count(1):
        loss = training.step()
        if taken == 1 and save is not None:
            is_durable = save()
        elif (ctx.global_step + 1) % EVERY_STEPS:
            ctx.step(loss=loss)
        if taken >= _LOOP_STEPS and (is_durable is None or is_durable()):
            return taken, time.perf_counter() - began
    raise AssertionError("it counts for ever")


# --- loading ---------------------------------------------------------------------------------------------------------


def loading(ctx: TrainContext) -> None:
    """How long it takes to bring a state back into the tensors that train, and into those of a new attempt."""
    params, training, ours = _begun(ctx)
    buffer = Buffer(training.tensors())
    ours.align()
    buffer.fill(training.tensors())
    until(ours.save())
    loaders = Loaders(training, Path(params.folder), checkpoint=ours.file)
    loads: dict[str, Callable[[], object]] = {
        "railbus": ctx.resume,
        "torch.load": loaders.torch_load,
        "torch.load, mapped": loaders.torch_load_mapped,
        "safetensors": loaders.safetensors,
        "DCP load": loaders.dcp_load,
    }
    at_start: dict[str, Callable[[], object]] = {
        "railbus": ctx.resume,
        "torch.load": loaders.torch_load_at_start,
        "torch.load, mapped": loaders.torch_load_mapped_at_start,
    }
    cases = [(where, name, load) for where in ("page cache", "disk") for name, load in loads.items()]
    cases += [(AT_START, name, load) for name, load in at_start.items()]
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for _ in range(params.rounds + 1):
        for where, name, load in cases:
            if where == "page cache":
                load()
            else:
                for path in loaders.files():
                    evict(path)
            training.change()
            if where == AT_START:
                training.optimizer.state.clear()
            found[where][name].append(_seconds(load))
            assert buffer.equals(training.tensors()), f"{name} did not bring back what was saved"
    ctx.event("measured", **{where: _counted(times) for where, times in found.items()})


# --- memory ----------------------------------------------------------------------------------------------------------


def holding(ctx: TrainContext) -> None:
    """How much memory the trainer and what writes for it hold at most, beyond the state itself."""
    params = ctx.params_as(Params)
    training = Training.begun(tiny=params.tiny)
    ctx.track(model=training.model, optimizer=training.optimizer)
    ctx.resume()
    before = _pss()
    ours = Ours(ctx, params)
    if params.mode == "async":
        ours.warm_up()
    ours.align()
    with _peak() as peak:
        for _ in range(params.rounds):
            until(ours.save())
            ours.align()
    state = sum(tensor.nbytes for tensor in training.tensors())
    ctx.event("measured", bytes=state, beyond=max(peak) - before, samples=len(peak))


@contextmanager
def _peak() -> Iterator[list[int]]:
    """What `_pss` gives, again and again, until the end of the block."""
    found, is_over = [_pss()], threading.Event()

    def watch() -> None:
        while not is_over.wait(0.02):
            found.append(_pss())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        is_over.set()
        watcher.join()


def _pss() -> int:
    """Bytes that this process and those that were forked beside it hold together; what is shared counts once."""
    found = 0
    for process in psutil.Process(os.getppid()).children(recursive=True):
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "Pss":
                found += int(value.split()[0]) << 10
    return found


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _counted(found: Seconds) -> Seconds:
    """Without the first of each."""
    return {name: [round(value, 4) for value in values[1:]] for name, values in found.items()}
