"""Keys on a running server: added, revoked and replaced by the command, and what their holders notice."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import pty
import stat
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import nkeys
import pytest

from commands import environment, railbus_here
from railbus.client import Client
from railbus.deployment import deploy
from railbus.embedded.members import Place, ensure_members
from railbus.embedded.nats_server import NatsServer, find_server
from railbus.embedded.run_files import RunPaths
from railbus.embedded.server_config import ServerFiles, render
from railbus_shared.bus import topology
from railbus_shared.bus.connection import Bus
from railbus_shared.errors import NotAuthorized
from railbus_shared.settings import CommonSettings
from servers import Server
from until import PATIENCE_S, until


class Root:
    """A root whose NATS runs, as `railbus up` runs it."""

    def __init__(self, folder: Path, server: NatsServer) -> None:
        self.folder, self.server = folder, server
        self.place = Place.of_root(folder)

    def keys(self, *words: str) -> str:
        done = railbus_here("--root", str(self.folder), "keys", *words, cwd=self.folder)
        assert done.status == 0, done.err
        return done.out

    def settings(self, name: str) -> CommonSettings:
        return CommonSettings(root=self.folder, nats_url=self.server.url, nats_key_file=self.place.seed(name))


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Root]:
    paths = RunPaths(tmp_path / "learning")
    paths.make()
    place, where = Place.of_root(paths.root), ServerFiles(paths.nats)

    def content(port: int) -> bytes:
        keys, granted = ensure_members(place)
        return render(where, port=port, name="test", keys=keys, policy=granted)

    server = NatsServer(find_server(), where=where, render=content, port=0)
    server.start()
    yield Root(paths.root, server)
    server.stop()


async def test_a_key_that_is_added_is_let_in_at_once_and_nobody_else_notices(root: Root) -> None:
    async with (
        Bus.open(root.settings("device_manager"), name="device_manager", service=True) as manager,
        Bus.open(root.settings("user"), name="user") as user,
    ):
        await topology.ensure(manager, root.folder / "store.json")
        for name in ("ann", "ben"):
            root.keys("add", name)
            async with Bus.open(root.settings(name), name=name) as bus:
                await bus.check_jetstream()
                reply = await bus.client.request("railbus.jobs.submit", b"{}", timeout=PATIENCE_S)
                assert json.loads(reply.data)["stream"] == "RAILBUS_JOBS"
        root.keys("revoke", "ben")
        await user.client.request("railbus.jobs.submit", b"{}", timeout=PATIENCE_S)
        assert await manager.last_sequence("RAILBUS_JOBS") == 3  # each was stored once, whatever was reloaded
        assert (manager.generation, user.generation) == (0, 0)


async def test_a_revoked_key_is_cut_and_its_clients_end_with_the_reason(root: Root) -> None:
    root.keys("add", "ann")
    async with Bus.open(root.settings("runner"), name="runner", service=True) as runner:
        await topology.ensure(runner, root.folder / "store.json")
    async with Client.connect(root.settings("ann")) as client:
        asking = asyncio.ensure_future(anext(client.follow_all()))
        watching = asyncio.ensure_future(client.bus.run())
        await until(lambda: len(client.bus.client._subs) > 1)  # it listens to events
        assert root.keys("revoke", "ann") == "the key of ann is of no use any more\n"
        for task in (watching, asking):
            with pytest.raises(NotAuthorized, match="knows this key no more"):
                async with asyncio.timeout(PATIENCE_S):
                    await task
        with pytest.raises(NotAuthorized):
            await client.devices()
    assert not root.place.seed("ann").exists()
    assert "ann" not in root.keys("list")


def test_a_command_that_follows_exits_when_its_key_is_revoked(root: Root) -> None:
    async def make() -> None:
        async with Bus.open(root.settings("runner"), name="runner", service=True) as runner:
            await topology.ensure(runner, root.folder / "store.json")

    asyncio.run(make())
    root.keys("add", "ann", "--read-only")
    seed = root.place.seed("ann").read_text().strip()
    env = environment({"RAILBUS_NATS_URL": root.server.url, "RAILBUS_NATS_KEY_FILE": str(root.place.seed("ann"))})
    words = [sys.executable, "-m", "railbus.cli.main", "events", "--follow"]
    with subprocess.Popen(words, cwd=root.folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            asyncio.run(until(lambda: _num_connected(root) > 0))
            root.keys("revoke", "ann")
            out, err = process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
    assert process.returncode == 4, err
    assert b"error[NOT_AUTHORIZED]" in err
    assert seed.encode() not in out + err + Path(ServerFiles(root.place.config.parent).log).read_bytes()


def _num_connected(root: Root) -> int:
    """Established connections to the server, as the kernel lists them."""
    here = f":{root.server.port:04X} 0"
    return sum(here in line and " 01 " in line for line in Path("/proc/net/tcp").read_text().splitlines())


async def test_a_key_that_was_replaced_is_refused_and_the_new_one_is_not(root: Root) -> None:
    before = root.settings("user").nats_key_file
    assert before is not None
    old = root.folder / "old.nk"
    old.write_bytes(before.read_bytes())
    old.chmod(0o600)
    for name in ("user", "runner"):
        root.keys("rotate", name)
        async with Bus.open(root.settings(name), name=name, service=name != "user") as bus:
            await bus.check_jetstream()
    with pytest.raises(NotAuthorized):
        async with Bus.open(root.settings("user").model_copy(update={"nats_key_file": old}), name="old"):
            pass


async def test_who_is_connected_goes_on_with_the_key_that_took_the_place_of_its_own(root: Root) -> None:
    """A runner that ended for it would take its trainers with it."""
    async with Bus.open(root.settings("runner"), name="runner", service=True) as runner:
        watching = asyncio.ensure_future(runner.run())
        root.keys("rotate", "runner")
        await until(lambda: runner.generation > 0 or watching.done())
        assert not watching.done()
        await runner.check_jetstream()
        watching.cancel()


async def test_a_key_that_is_shown_too_late_is_no_wrong_key(tmp_path: Path) -> None:
    """As on a busy machine: the server waits for it no longer than it was told to, and says "authentication"."""
    server = Server(tmp_path, jetstream=False, extra="authorization { user: a, password: b, timeout: 0.5 }")
    server.start()
    handling: list[asyncio.Task[None] | None] = []

    async def hand_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handling.append(asyncio.current_task())
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", server.port)
        if len(handling) == 1:  # nothing of what the first one says arrives
            await asyncio.gather(_pour(up_reader, writer), _close(up_writer, after=reader))
        else:
            await asyncio.gather(_pour(up_reader, writer), _pour(reader, up_writer))

    between = await asyncio.start_server(hand_on, "127.0.0.1", 0)
    try:
        port = between.sockets[0].getsockname()[1]
        async with Bus.open(CommonSettings(root=tmp_path, nats_url=f"nats://a:b@127.0.0.1:{port}"), name="late"):
            assert len(handling) >= 2
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*(task for task in handling if task))
    finally:
        between.close()
        server.stop()


async def _pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(4096):
            writer.write(data)
    await _close(writer, after=None)


async def _close(writer: asyncio.StreamWriter, *, after: asyncio.StreamReader | None) -> None:
    with contextlib.suppress(OSError):
        if after is not None:
            await after.read()
        writer.close()
        await writer.wait_closed()


async def test_who_made_a_key_keeps_the_secret(root: Root, tmp_path: Path) -> None:
    seed = nkeys.encode_seed(bytes(range(32)), nkeys.PREFIX_BYTE_USER)
    public = bytes(nkeys.from_seed(bytearray(seed)).public_key).decode()
    root.keys("add", "ben", "--public", public)
    mine = tmp_path / "mine.nk"
    mine.write_bytes(seed)
    mine.chmod(0o600)
    async with Bus.open(root.settings("user").model_copy(update={"nats_key_file": mine}), name="ben") as bus:
        await bus.check_jetstream()
    assert not root.place.seed("ben").exists()
    assert [one["has_seed"] for one in json.loads(root.keys("list", "--json")) if one["name"] == "ben"] == [False]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("add", "runner"), "CONFLICT"), (("add", "../ann"), "INVALID_NAME"), (("revoke", "user"), "CONFLICT"),
        (("rotate", "nobody"), "NOT_FOUND"), (("add", "ann", "--public", "UABC"), "CONFIG_ERROR"),
        (("add", "ann", "--public", "SU" + "A" * 56), "CONFIG_ERROR"), (("add", "zoe", "--read-only"), "CONFLICT"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_and_changes_nothing(tmp_path: Path, words: tuple[str, ...], code: str) -> None:
    deploy(tmp_path)
    done = railbus_here("keys", "add", "zoe", "-d", str(tmp_path), cwd=tmp_path)
    assert done.status == 0, done.err
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    done = railbus_here("keys", *words, "-d", str(tmp_path), cwd=tmp_path)
    assert (done.status != 0, f"error[{code}]" in done.err) == (True, True), done.err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("whose", ["runner", "user", "zoe"])
def test_a_key_that_another_has_is_refused(tmp_path: Path, whose: str) -> None:
    """nats-server refuses a configuration that names a key twice: it would not start, and not cut the revoked."""
    deploy(tmp_path)
    railbus_here("keys", "add", "zoe", "-d", str(tmp_path), cwd=tmp_path)
    listed = json.loads(railbus_here("keys", "list", "--json", "-d", str(tmp_path), cwd=tmp_path).out)
    public = next(one["public"] for one in listed if one["name"] == whose)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    done = railbus_here("keys", "add", "eve", "--public", public, "-d", str(tmp_path), cwd=tmp_path)
    assert (done.status != 0, "error[CONFLICT]" in done.err, repr(whose) in done.err) == (True, True, True), done.err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_list_with_a_key_of_another_is_refused_whole_and_can_be_mended_by_the_commands(tmp_path: Path) -> None:
    deploy(tmp_path)
    config, people = (tmp_path / "nats.conf").read_bytes(), tmp_path / "people.json"
    listed = json.loads(railbus_here("keys", "list", "--json", "-d", str(tmp_path), cwd=tmp_path).out)
    public = next(one["public"] for one in listed if one["name"] == "runner")
    people.write_text(json.dumps({"eve": {"role": "user", "public": public}}))
    done = railbus_here("init", str(tmp_path), cwd=tmp_path)
    assert (done.status, "'runner' and 'eve'" in done.err) == (2, True), done.err
    assert (tmp_path / "nats.conf").read_bytes() == config
    assert railbus_here("keys", "revoke", "eve", "-d", str(tmp_path), cwd=tmp_path).status == 0
    assert railbus_here("init", str(tmp_path), cwd=tmp_path).status == 0
    assert (tmp_path / "nats.conf").read_bytes() == config


def test_init_does_not_say_that_it_has_made_the_keys_that_were_there(tmp_path: Path) -> None:
    first, second, with_tls = (
        railbus_here("init", "deploy", *more, cwd=tmp_path).out for more in ((), (), ("--tls", "--host", "a"))
    )
    kept = "6 keys in deploy/keys, those that were there as they were; "
    assert first == with_tls == f"{kept}what NATS reads has changed\n"
    assert second == f"{kept}nothing has changed\n"


def test_a_deployment_keeps_its_keys_and_what_was_revoked_stays_so(tmp_path: Path) -> None:
    folder = tmp_path / "deploy"
    assert railbus_here("init", str(folder), "--tls", "--host", "nats.example.com", cwd=tmp_path).status == 0
    added = railbus_here("keys", "add", "ann", "-d", str(folder), cwd=tmp_path)
    assert (added.status, "docker compose" in added.err) == (0, True)
    public = json.loads((folder / "people.json").read_bytes())["ann"]["public"]
    assert public in (folder / "nats.conf").read_text()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert not deploy(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    secrets = [path for path in folder.rglob("*") if path.suffix in {".nk", ".key"}]
    assert len(secrets) == 9
    assert {stat.S_IMODE(path.stat().st_mode) for path in (*secrets, folder / "people.json")} == {0o600}
    railbus_here("keys", "revoke", "ann", "-d", str(folder), cwd=tmp_path)
    deploy(folder)
    assert public not in (folder / "nats.conf").read_text()
    assert not (folder / "keys" / "ann.nk").exists()


def test_the_list_of_keys_is_a_row_for_each_on_a_terminal_of_eighty_columns(tmp_path: Path) -> None:
    deploy(tmp_path)
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    words = [sys.executable, "-m", "railbus.cli.main", "keys", "list", "-d", str(tmp_path)]
    env = {**environment({"TERM": "xterm"}), "COLUMNS": "80"}
    env.pop("CI", None)
    env.pop("NO_COLOR", None)
    done = subprocess.run(words, stdin=other, stdout=other, stderr=other, env=env, timeout=PATIENCE_S, check=True)
    os.close(other)
    rows = os.read(main, 65536).decode().splitlines()
    os.close(main)
    assert (done.returncode, len(rows)) == (0, 1 + 4 + 2)
    assert all("service" in row or "user" in row or "operator" in row for row in rows[1:])


@pytest.mark.parametrize("verb", ["revoke", "rotate"])
def test_whom_nobody_knows_has_no_key_to_lose(tmp_path: Path, verb: str) -> None:
    deploy(tmp_path)
    railbus_here("keys", "add", "ann", "-d", str(tmp_path), cwd=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    done = railbus_here("keys", verb, "anna", "-d", str(tmp_path), cwd=tmp_path)
    assert (done.status, done.out) == (3, "")
    assert done.err.splitlines() == [
        "error[NOT_FOUND]: user has value 'anna': nobody of this name has a key",
        "hint: did you mean 'ann'? `railbus keys list` shows who has one",
    ]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("has_seed", [True, False])
def test_a_revocation_that_was_cut_short_is_completed_by_the_same_command(tmp_path: Path, *, has_seed: bool) -> None:
    """As a kill leaves it: the seed is still there, or the server's configuration alone is the old one."""
    deploy(tmp_path)
    without = (tmp_path / "nats.conf").read_bytes()
    railbus_here("keys", "add", "ann", "-d", str(tmp_path), cwd=tmp_path)
    (tmp_path / "people.json").write_text("{}")
    if not has_seed:
        (tmp_path / "keys" / "ann.nk").unlink()
    done = railbus_here("keys", "revoke", "ann", "-d", str(tmp_path), cwd=tmp_path)
    assert (done.status, done.out) == (0, "the key of ann is of no use any more\n"), done.err
    assert (tmp_path / "nats.conf").read_bytes() == without
    assert not (tmp_path / "keys" / "ann.nk").exists()
    assert railbus_here("keys", "revoke", "ann", "-d", str(tmp_path), cwd=tmp_path).status == 3


def test_a_root_that_is_named_by_a_relative_path_or_a_link_is_the_same(root: Root) -> None:
    """`./learning` is the default: a key that is revoked there must be cut, too."""
    (root.folder.parent / "link").symlink_to(root.folder)
    for name in (root.folder.name, "link"):
        done = railbus_here("--root", name, "keys", "add", f"ann-{name}", cwd=root.folder.parent)
        assert (done.status, done.err) == (0, "")


def test_a_change_that_was_cut_short_is_completed_by_the_same_command(tmp_path: Path) -> None:
    """As a kill leaves it: the seed is there, or the list as well, and the server's configuration is the old one."""
    deploy(tmp_path)
    config = (tmp_path / "nats.conf").read_bytes()
    railbus_here("keys", "add", "ann", "-d", str(tmp_path), cwd=tmp_path)
    whole = (tmp_path / "nats.conf").read_bytes()
    (tmp_path / "nats.conf").write_bytes(config)
    railbus_here("keys", "add", "ann", "-d", str(tmp_path), cwd=tmp_path)
    assert (tmp_path / "nats.conf").read_bytes() == whole
    (tmp_path / "nats.conf").write_bytes(config)
    (tmp_path / "people.json").unlink()
    railbus_here("keys", "add", "ann", "-d", str(tmp_path), cwd=tmp_path)
    assert (tmp_path / "nats.conf").read_bytes() == whole


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_what_root_changes_goes_on_to_belong_to_whom_it_belonged(tmp_path: Path) -> None:
    """NATS in its container could not read its configuration else, and would go on to let in whose key was revoked."""
    deploy(tmp_path)
    theirs = (tmp_path / "nats.conf", tmp_path / "keys" / "runner.nk")
    before = [path.read_bytes() for path in theirs]
    for path in theirs:
        os.chown(path, 10001, 10001)
    for words in (("add", "ann"), ("rotate", "runner")):
        assert railbus_here("keys", *words, "-d", str(tmp_path), cwd=tmp_path).status == 0
    assert [(path.stat().st_uid, path.stat().st_gid) for path in theirs] == [(10001, 10001)] * 2
    assert all(path.read_bytes() != old for path, old in zip(theirs, before, strict=True))


@pytest.mark.parametrize("name", ["nats.conf", "keys/runner.nk"])
def test_a_file_that_cannot_be_read_is_told_as_that(tmp_path: Path, name: str) -> None:
    """A link to itself stands for a file of another user, which root could read."""
    deploy(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(tmp_path / name)
    done = railbus_here("keys", "add", "ann", "-d", str(tmp_path), cwd=tmp_path)
    done = done if done.status else railbus_here("keys", "list", "-d", str(tmp_path), cwd=tmp_path)
    assert (done.status, f"{name}' cannot be read" in done.err, "docker compose run" in done.err) == (2, True, True)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"ann": {}}', '{"ann": {"role": "god", "public": "U"}}', '{"../x": {}}']
)
def test_a_damaged_list_is_refused_and_lets_nobody_in(tmp_path: Path, content: str) -> None:
    deploy(tmp_path)
    config = (tmp_path / "nats.conf").read_bytes()
    (tmp_path / "people.json").write_text(content)
    done = railbus_here("keys", "add", "ben", "-d", str(tmp_path), cwd=tmp_path)
    assert (done.status, "people.json" in done.err) == (2, True), done.err
    assert railbus_here("init", str(tmp_path), cwd=tmp_path).status == 2
    assert (tmp_path / "nats.conf").read_bytes() == config
