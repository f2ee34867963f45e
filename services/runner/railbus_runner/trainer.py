"""The trainer: the child process that runs the user's entrypoint, forked from the pre-warmed process.

It reads its plan, makes the process what the plan says (seeds, threads, devices, logging), runs the entrypoint with one
`TrainContext`, and says how that ended. It touches no bus; if the runner's end of the socket closes, it ends at once.
In: plan, deadline, stop, save, verified, committed, refused. Out: events, moved, verify, commit, ended.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from railbus_runner import ranks
from railbus_runner.channel import TrainerChannel
from railbus_runner.checkpointing.keeping import Keeper
from railbus_runner.checkpointing.rng import seed_everything
from railbus_runner.checkpointing.room import Room
from railbus_runner.checkpointing.saver import Saver
from railbus_runner.checkpointing.tracked import Tracked
from railbus_runner.context import TrainContext
from railbus_runner.endings import CommitRefused, RunnerGone, Stopped
from railbus_runner.entrypoints import registry
from railbus_runner.failures import error_body, told
from railbus_runner.frames import Ended, Plan
from railbus_runner.moving import Pulse
from railbus_runner.progress import Progress
from railbus_runner.provenance import git_commit
from railbus_runner.recorder import Recorder, RecordingHandler
from railbus_runner.stalling import moving_every_s
from railbus_runner.team import Seat, Team
from railbus_runner.terminating import Termination
from railbus_shared import tracing
from railbus_shared.contracts.devices import DeviceInfo
from railbus_shared.errors import BadSetting, RailbusError, TrainerLost
from railbus_shared.layout import Layout

EXIT_OK: Final = 0
"""The entrypoint returned, or the trainer stopped as it was asked to."""
EXIT_FAILED: Final = 1
EXIT_RUNNER_GONE: Final = 3

logger = logging.getLogger(__name__)

_THREAD_VARIABLES: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def main(sock: socket.socket) -> int:
    """Live one attempt; takes over the socket, and gives the exit code."""
    began_s = time.monotonic()
    channel = TrainerChannel(sock)
    try:
        plan = channel.plan()
        if plan.spec.ranks == 1:
            return live(plan, channel, began_s=began_s)
        if (refusal := ranks.refusal(plan)) is not None:
            channel.send(Ended(outcome="failed", error=error_body(refusal)))
            return EXIT_FAILED
    except RunnerGone:
        return EXIT_RUNNER_GONE
    importlib.import_module("railbus_runner.team_progress")  # once, before the fork, for all ranks
    return ranks.lead(plan, sock, rank_main=functools.partial(live, began_s=began_s))


def live(plan: Plan, channel: TrainerChannel, seat: Seat | None = None, *, began_s: float) -> int:
    """Live an attempt, or one rank of it, from its plan on; gives the exit code.

    `seat` is for meeting the other ranks, if there are several.
    """
    try:
        recorder = Recorder.of_plan(plan, channel.send, offer=channel.offer)
        trainer = Trainer(plan, channel=channel, recorder=recorder, began_s=began_s, seat=seat)
        ended = trainer.run()
        recorder.flush()
        channel.send(ended)
    except RunnerGone:
        return EXIT_RUNNER_GONE
    return trainer.failed_code if ended.outcome == "failed" else EXIT_OK


class Trainer:
    """One attempt, from its plan to its end."""

    def __init__(
        self,
        plan: Plan,
        *,
        channel: TrainerChannel,
        recorder: Recorder,
        began_s: float,
        seat: Seat | None = None,
    ) -> None:
        self._plan = plan
        self._channel = channel
        self._recorder = recorder
        self.failed_code = EXIT_FAILED
        """The exit code of a failure: the entrypoint's own, where it left by `sys.exit`."""
        self._seat = seat
        self._team = Team(plan.rank, plan.world_size)
        self._tracked, self._saver, progress_kind = _parts(plan, channel=channel, recorder=recorder, team=self._team)
        pulse = Pulse(channel.offer, every_s=moving_every_s(plan.spec.stall_s))
        keeper = Keeper(
            plan.spec,
            room=Room(Layout(Path(plan.root)).checkpoints(plan.spec.model)),
            saver=self._saver,
            tracked=self._tracked,
            channel=channel,
            recorder=recorder,
            pulse=pulse,
        )
        self._progress = progress_kind(
            channel=channel,
            recorder=recorder,
            saver=self._saver,
            keeper=keeper,
            tracked=self._tracked,
            pulse=pulse,
            began_s=began_s,
            metric=plan.spec.checkpoint.metric,
        )
        self._termination = Termination(channel)

    def run(self) -> Ended:
        """Run the entrypoint; whatever it does, the answer says how it ended. Raises RunnerGone alone."""
        try:
            is_finished = self._train()
        except RunnerGone:
            raise
        except Stopped:
            is_finished = False
        except CommitRefused as exc:
            return Ended(outcome="failed", error=error_body(exc.error))
        except BaseException as exc:  # noqa: BLE001 - of user code, and told as it is
            return self._failed(exc)
        return Ended(outcome="succeeded" if is_finished else "stopped", metrics=self._progress.curves.latest)

    def _train(self) -> bool:
        """False if the entrypoint returned because it was asked to stop."""
        plan = self._plan
        try:
            context = self._prepared()
        except (RailbusError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as exc:
            raise TrainerLost(f"the trainer could not be made ready: {exc!r}", details=told(exc)) from exc
        entrypoint = registry.resolve(plan.spec.entrypoint, [Path(folder) for folder in plan.entrypoint_dirs])
        if plan.spec.entrypoint not in registry.BUILTIN and (source := inspect.getsourcefile(entrypoint)):
            self._saver.git_commit = git_commit(Path(source))
        entrypoint(context)
        return self._progress.finish()

    def _prepared(self) -> TrainContext:
        """Everything before the first line of user code."""
        self._join_process()
        taken = take_devices(self._plan.devices, memory_frac=self._plan.spec.devices.fraction)
        devices = own_share(taken, self._plan)
        if self._seat is not None:
            self._team.join(self._seat, device=devices[0])
        self._saver.tidy()
        return TrainContext(
            self._plan,
            devices=devices,
            channel=self._channel,
            recorder=self._recorder,
            progress=self._progress,
            tracked=self._tracked,
        )

    def _join_process(self) -> None:
        """Seeds, threads and logging; and no word of a process that user code forks passes for this one's."""
        os.register_at_fork(after_in_child=self._detach)
        if self._plan.trace is not None:
            os.environ.setdefault(tracing.VARIABLE, self._plan.trace)
        self._termination.install()
        logging.basicConfig(
            level=logging.INFO,
            handlers=[
                RecordingHandler(
                    self._recorder, step=lambda: self._progress.global_step, fields=line_fields(self._plan)
                )
            ],
            force=True,
        )
        seed_everything(self._plan.spec.seed)
        use_threads(max(1, num_threads(self._plan.devices) // self._plan.world_size))

    def _detach(self) -> None:
        self._recorder.detach()
        self._channel.detach()
        self._saver.detach()

    def _failed(self, exc: BaseException) -> Ended:
        """What waits is told as well: it may show why."""
        if isinstance(exc, SystemExit) and isinstance(exc.code, int):
            self.failed_code = exc.code & 0xFF or EXIT_FAILED
        try:
            self._saver.settle()
        except CommitRefused:  # then the attempt is over, and the runner has been told
            pass
        except (RailbusError, OSError):  # of the checkpoint, which must not hide why the attempt ends
            logger.exception("a checkpoint that was being written came to nothing")
        try:
            self._progress.curves.flush()
        except TypeError:  # the metric that is no number, which is what `exc` says already
            self._progress.curves.latest.clear()
        return Ended(outcome="failed", error=error_body(exc), metrics=self._progress.curves.latest)


def _parts(
    plan: Plan, *, channel: TrainerChannel, recorder: Recorder, team: Team
) -> tuple[Tracked, Saver, type[Progress]]:
    """What is another thing for one rank of several than for one alone."""
    layout = Layout(Path(plan.root))
    if team.world_size == 1:
        tracked = Tracked()
        return tracked, Saver(plan, layout=layout, tracked=tracked, channel=channel, recorder=recorder), Progress
    from railbus_runner import team_progress  # noqa: PLC0415 - few need it

    return team_progress.parts(plan, layout=layout, channel=channel, recorder=recorder, team=team)


def line_fields(plan: Plan) -> dict[str, object]:
    """What is told with every line that is logged."""
    return {"rank": plan.rank} if plan.world_size > 1 else {}


def own_share(devices: tuple[torch.device, ...], plan: Plan) -> tuple[torch.device, ...]:
    """Of the leased devices those of this rank: its share of the GPUs, or the CPU.

    It sees the others too, as under torchrun, so that `LOCAL_RANK` means the same device.
    """
    count = len(devices) // plan.world_size
    return devices[plan.rank * count :][:count] or devices


def num_threads(devices: Sequence[DeviceInfo]) -> int:
    """As many as the leased CPU slots have cores, within what this process may use; all of that for a GPU."""
    usable = os.sched_getaffinity(0)
    leased = {core for device in devices for core in device.cores}
    return len(leased & usable) or len(usable)


def use_threads(count: int) -> None:
    """Size torch's pool, and by the environment the pools of processes that user code starts."""
    torch.set_num_threads(count)
    for variable in _THREAD_VARIABLES:
        os.environ[variable] = str(count)


def take_devices(devices: Sequence[DeviceInfo], *, memory_frac: float | None = None) -> tuple[torch.device, ...]:
    """The leased devices as torch names them; hides all other GPUs. Must come before CUDA is touched.

    `memory_frac` of a GPU's memory is all that PyTorch will take of it in this process: an allocation beyond it is out
    of memory. It binds PyTorch's own allocator alone: not the driver's context, other libraries or other processes.

    Raises BadSetting where a GPU is leased and torch can use none.
    """
    uuids = [device.uuid for device in devices if device.kind == "gpu"]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(uuids)
    if not uuids:
        return (torch.device("cpu"),)
    if not torch.cuda.is_available():
        raise BadSetting(
            f"the job has leased {len(uuids)} GPU(s), but torch {torch.__version__} can use none on this host",
            hint="install a build of torch with CUDA that fits the driver, or take the GPUs from this host's devices",
        )
    taken = tuple(torch.device("cuda", number) for number in range(torch.cuda.device_count()))
    if memory_frac is not None:
        for device in taken:
            torch.cuda.set_per_process_memory_fraction(memory_frac, device)
    return taken
