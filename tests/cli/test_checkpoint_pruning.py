"""What is not needed goes, and nothing else: by policy, by hash, and by what jobs name."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from commands import Done, railbus, railbus_here
from played_cluster import JOB, History, PlayedRunner, device_manager, played_runner
from railbus.checkpoints.in_use import in_use
from railbus.checkpoints.leftovers import leftovers
from railbus.checkpoints.pruning import dead, litter
from railbus.client import Client
from railbus_shared import files
from railbus_shared.bus.connection import Bus
from railbus_shared.contracts.artifacts import CheckpointMeta
from railbus_shared.contracts.jobs import CheckpointRef, JobRecord
from railbus_shared.happenings import Saved
from railbus_shared.layout import Layout, checkpoint_stem
from railbus_shared.settings import CommonSettings
from records_for_tests import record
from small_checkpoints import write_checkpoint
from until import until

MODEL = "digits-cnn"


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """Of job j-1 the checkpoints 1, 2, 4 and 5, of job j-2 the checkpoint 3; the lower the loss, the better."""
    made = Layout(tmp_path / "learning")
    for number, job, loss in ((1, "j-1", 0.1), (2, "j-1", 0.5), (3, "j-2", 0.3), (4, "j-1", 0.2), (5, "j-1", 0.4)):
        write_checkpoint(made, number, content=b"w" * number)
        change(made, number, job=job, metrics={"loss": loss}, policy={"keep_last": 2})
    return made


def change(layout: Layout, number: int, **fields: object) -> None:
    path = layout.checkpoint_meta(MODEL, number)
    meta = CheckpointMeta.model_validate_json(path.read_bytes()).changed(**fields)
    path.write_bytes(files.to_json(meta.to_map()))


def there(layout: Layout) -> list[int]:
    """Numbers of the checkpoints that are whole, after making sure that nothing is left of the others."""
    names = {path.name for path in layout.checkpoints(MODEL).iterdir() if not path.name.startswith(".")}
    numbers = [number for number in range(1, 10) if f"{checkpoint_stem(number)}.pt" in names]
    assert names == {f"{checkpoint_stem(number)}{end}" for number in numbers for end in (".pt", ".meta.json")}
    return numbers


def prune(layout: Layout, *words: str, status: int = 0) -> str:
    done = railbus_here("checkpoints", "prune", "--offline", *words, cwd=layout.root.parent)
    assert done.status == status, done.err
    return done.out + done.err


@pytest.mark.parametrize(
    ("words", "left"),
    [
        ([], [3, 4, 5]),
        (["--keep-last", "1"], [3, 5]),
        (["--keep-last", "1", "--keep-best", "1", "--metric", "loss"], [1, 3, 5]),
        (["--keep-last", "1", "--keep-best", "2", "--metric", "loss", "--best", "max"], [2, 3, 5]),
        (["--keep-last", "1", "--keep-every-steps", "200"], [2, 3, 4, 5]),
        (["--job", "j-2", "--keep-last", "1"], [1, 2, 3, 4, 5]),
        ([MODEL, "--job", "j-1", "--keep-last", "3"], [2, 3, 4, 5]),
    ],
)
def test_of_each_job_stays_what_its_policy_or_the_options_keep(
    layout: Layout, words: list[str], left: list[int]
) -> None:
    prune(layout, "--dry-run", *words)
    assert there(layout) == [1, 2, 3, 4, 5]
    prune(layout, "--yes", *words)
    assert there(layout) == left


def test_it_is_said_what_goes_and_why_the_rest_stays(layout: Layout) -> None:
    said = prune(layout, "--dry-run", "--keep-best", "1", "--metric", "loss")
    fates = {line.split()[1]: line.split(maxsplit=6)[6] for line in said.splitlines()[1:6]}
    assert fates == {"1": "best", "2": "goes", "3": "newest, best", "4": "newest", "5": "newest"}
    assert said.endswith("Would remove: 1 of 5 checkpoints, 2 B.\n")
    listed = railbus_here("checkpoints", MODEL, cwd=layout.root.parent).out
    assert [line.split()[-1] for line in listed.splitlines()[1:]] == ["-", "-", "newest", "newest", "newest"]


def test_the_only_valid_one_stays_however_old_it_is(layout: Layout) -> None:
    for number in (2, 4, 5):
        (layout.checkpoints(MODEL) / f"{checkpoint_stem(number)}.pt").write_bytes(b"damaged")
    assert "damaged, and too few others" in prune(layout, "--yes", "--keep-last", "1")
    assert there(layout) == [1, 2, 3, 4, 5]


def test_of_a_damaged_newest_the_one_before_stays_in_its_place(layout: Layout) -> None:
    (layout.checkpoints(MODEL) / "checkpoint-000005.pt").write_bytes(b"wwww!")
    prune(layout, "--yes", "--keep-last", "1")
    assert there(layout) == [3, 4, 5]


def test_a_meta_that_cannot_be_read_belongs_to_nobody_and_stays(layout: Layout) -> None:
    layout.checkpoint_meta(MODEL, 1).write_bytes(b"{")
    assert "warning: checkpoint" in prune(layout, "--yes", "--keep-last", "1")
    assert there(layout) == [1, 3, 5]


def test_a_meta_that_names_files_of_another_takes_none_of_them_with_it(layout: Layout) -> None:
    meta = CheckpointMeta.model_validate_json(layout.checkpoint_meta(MODEL, 5).read_bytes())
    change(layout, 1, files=[file.to_map() for file in meta.files])
    prune(layout, "--yes")
    assert layout.checkpoint_meta(MODEL, 1).exists() is False
    assert (layout.checkpoints(MODEL) / "checkpoint-000005.pt").exists()


def test_a_sharded_one_goes_with_its_folder(layout: Layout) -> None:
    folder = layout.checkpoints(MODEL) / "checkpoint-000001.dcp"
    folder.mkdir()
    (folder / ".metadata").write_bytes(b"m")
    (layout.checkpoints(MODEL) / "checkpoint-000001.pt").unlink()
    shard = {"file": "checkpoint-000001.dcp/.metadata", "bytes": 1, "sha256": files.sha256_file(folder / ".metadata")}
    change(layout, 1, format="dcp", files=[shard])
    prune(layout, "--yes")
    assert there(layout) == [3, 4, 5]


def test_checkpoints_that_do_not_say_their_policy_need_to_be_told(layout: Layout) -> None:
    for number in range(1, 6):
        change(layout, number, policy=None)
    assert "say how many are to be kept: --keep-last 3" in prune(layout, "--yes", status=6)
    assert there(layout) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ([], 2, "say --yes or --dry-run"),
        (["--yes"], 5, "say --offline if nothing does"),
        (["--yes", "--offline", "--keep-last", "0"], 2, "keep-last"),
        (["--yes", "--offline", "--keep-best", "1"], 6, "`keep_best` and `metric` go together"),
        (["--yes", "--offline", "dgits-cnn"], 3, "did you mean 'digits-cnn'?"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_goes(
    layout: Layout, words: list[str], status: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAILBUS_NATS_URL", "nats://127.0.0.1:1")
    done = railbus_here("checkpoints", "prune", *words, cwd=layout.root.parent)
    assert (done.status, said in done.err) == (status, True), done.err
    assert there(layout) == [1, 2, 3, 4, 5]


# --- litter ----------------------------------------------------------------------------------------------------------

NOW_S = time.time()


def leave(layout: Layout, name: str, *, content: bytes = b"x", age_s: float = 3600.0) -> Path:
    path = layout.checkpoints(MODEL) / name
    path.write_bytes(content)
    os.utime(path, (NOW_S - age_s, NOW_S - age_s))
    return path


def attempt(layout: Layout, number: int, *, job: str = "j-9", lease_epoch: int = 1, age_s: float = 3600.0) -> None:
    """What an attempt has left that was killed before its checkpoint was recorded."""
    leave(layout, f".serial-{number:06d}", content=f"{job} {lease_epoch}".encode(), age_s=age_s)
    leave(layout, f".checkpoint-{number:06d}.pt.tmp", age_s=age_s)


RUNNING = record("running")
LITTER: dict[str, tuple[JobRecord | None, float, bool]] = {
    "of a job that has ended": (record("failed"), 3600.0, True),
    "of a job that waits": (record("queued"), 3600.0, True),
    "of an attempt before": (RUNNING.changed(lease_epoch=2), 3600.0, True),
    "of an attempt that runs": (RUNNING, 3600.0, False),
    "just written": (record("failed"), 5.0, False),
    "of a job that nobody knows": (None, 3600.0, False),
    "of a job that nobody has known for days": (None, 2 * 86_400.0, True),
    "recorded, and to be completed": (
        record("queued", checkpoint=CheckpointRef(number=7, step=1, sha256="0" * 64)), 3600.0, False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LITTER)
def test_only_what_is_surely_of_no_use_is_litter(layout: Layout, case: str) -> None:
    known, age_s, goes = LITTER[case]
    attempt(layout, 7, age_s=age_s)
    records = {"j-9": known.changed(id="j-9")} if known is not None else {}
    found = leftovers(layout, MODEL)
    assert [one.kind for one in found] == ["draft", "claim"]
    assert [dead(one, records, now_s=NOW_S) for one in found] == [goes, goes]
    assert litter(layout, MODEL, found, records, now_s=NOW_S) == (found if goes else [])


def test_litter_goes_but_numbers_never_come_again_and_recorded_ones_stay(layout: Layout) -> None:
    attempt(layout, 6)
    leave(layout, "checkpoint-000007.pt")
    leave(layout, ".checkpoint-000007.meta.json.tmp")
    attempt(layout, 8)
    attempt(layout, 9, age_s=-3600.0)  # young for as long as a slow machine takes
    prune(layout, "--yes", "--keep-last", "4")
    assert len(leftovers(layout, MODEL)) == 8, "only with --litter"
    prune(layout, "--yes", "--keep-last", "4", "--litter")
    left = {path.name for path in layout.checkpoints(MODEL).iterdir() if "-00000" in path.name} - {
        f"{checkpoint_stem(number)}{end}" for number in range(1, 6) for end in (".pt", ".meta.json")
    }
    young = {".serial-000009", ".checkpoint-000009.pt.tmp"}
    assert left == {"checkpoint-000007.pt", ".checkpoint-000007.meta.json.tmp"} | young
    os.utime(layout.checkpoints(MODEL) / ".serial-000009", (0, 0))
    os.utime(layout.checkpoints(MODEL) / ".checkpoint-000009.pt.tmp", (0, 0))
    prune(layout, "--yes", "--keep-last", "4", "--litter")
    assert (layout.checkpoints(MODEL) / ".serial-000009").read_bytes() == b"", "the highest number stays taken"


# --- what jobs name --------------------------------------------------------------------------------------------------


@pytest.fixture
async def runner(common: CommonSettings, bus: Bus) -> AsyncIterator[PlayedRunner]:
    assert bus
    settings, history = common.model_copy(update={"lease_ttl_s": 20}), History()
    async with (
        played_runner(settings, "a", history=history) as played,
        device_manager(settings, "dm1", history=history),
    ):
        yield played


@pytest.fixture
def ask(common: CommonSettings, layout: Layout) -> Callable[..., Awaitable[Done]]:
    """Runs a command of a user on the test's server."""

    async def run(*words: str) -> Done:
        env = {"RAILBUS_NATS_URL": common.nats_url}
        return await asyncio.to_thread(railbus, "checkpoints", *words, cwd=layout.root.parent, env=env)

    return run


async def test_what_jobs_that_have_not_ended_name_stays(
    bus: Bus, runner: PlayedRunner, layout: Layout, ask: Callable[..., Awaitable[Done]]
) -> None:
    client = Client(bus)
    job = (await client.submit({**JOB, "model": MODEL})).id
    await until(lambda: runner.has(job))
    await runner.apply(job, Saved(1, "a", CheckpointRef(number=4, step=4, sha256="0" * 64)))
    later = await client.submit({**JOB, "model": MODEL, "resume_from": "checkpoint-000002"})
    asked = await in_use(client, jobs=[job, "j-unknown"])
    assert asked.pinned == {MODEL: {4: "recorded", 2: "named"}}
    assert set(asked.records) == {job}
    done = await ask("prune", "--yes", "--keep-last", "1", "--json")
    found = done.json()
    assert isinstance(found, dict)
    assert found["removed"] == [f"{MODEL} 1"]
    assert {one["number"]: one["kept"] for one in found["kept"]} == {
        2: ["named"],
        3: ["newest"],
        4: ["recorded"],
        5: ["newest"],
    }
    await client.cancel(later.id)
    await runner.end(job)
    await until(lambda: _has_ended(client, later.id))
    assert (await ask("prune", "--yes", "--keep-last", "1")).status == 0
    assert there(layout) == [3, 5]


async def _has_ended(client: Client, job: str) -> bool:
    return (await client.job(job)).is_final


async def test_a_job_is_compared_with_its_record_where_that_is_asked_for(
    bus: Bus, runner: PlayedRunner, layout: Layout, ask: Callable[..., Awaitable[Done]]
) -> None:
    job = await Client(bus).submit({**JOB, "model": MODEL, "params": {"lr": 0.1}})
    await until(lambda: runner.has(job.id))
    change(layout, 5, job=job.id, spec_sha256=job.record.spec_sha256)
    change(layout, 4, job=job.id, spec_sha256="0" * 64)
    change(layout, 3, job="j-unknown", spec_sha256="0" * 64)
    shown = [(await ask("show", MODEL, str(number), "--ask")).out for number in (5, 4, 3)]
    assert re.search(rf"^job +{job.id} +proven +classifier, seed 0; its record has the hash", shown[0], re.MULTILINE)
    assert re.search(rf"^job +{job.id} +broken +its record asks for something else", shown[1], re.MULTILINE)
    assert re.search(r"^job +j-unknown +unknown +classifier, seed 0; ", shown[2], re.MULTILINE)
