"""TLS to a real nats-server: who proves to be the one that was asked for is joined, and nobody else."""

from __future__ import annotations

import logging
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from railbus.embedded.certificates import TlsFiles, ensure_certificates
from railbus.embedded.credentials import ensure_keys
from railbus_shared.bus.access import HeldAccess
from railbus_shared.bus.connection import Bus
from railbus_shared.errors import BadSetting, BusUnavailable, ConfigError, NotAuthorized
from railbus_shared.settings import CommonSettings
from servers import Server
from until import until

HOSTS = ("localhost", "127.0.0.1", "nats.example.com")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    where = TlsFiles(tmp_path_factory.mktemp("deploy") / "tls")
    assert ensure_certificates(where, HOSTS)
    return where


@pytest.fixture
def secured(certificates: TlsFiles, tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path, extra=_tls(certificates))
    server.start()
    yield server
    server.stop()


def _tls(certificates: TlsFiles) -> str:
    return f'tls {{ cert_file: "{certificates.server}", key_file: "{certificates.server_key}" }}'


def _settings(server: Server, ca_file: Path | None, *, scheme: str = "tls", host: str = "localhost") -> CommonSettings:
    return CommonSettings(nats_url=f"{scheme}://{host}:{server.port}", nats_ca_file=ca_file, connect_timeout_s=1)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
async def test_a_server_whose_certificate_fits_is_joined(secured: Server, certificates: TlsFiles, host: str) -> None:
    async with Bus.open(_settings(secured, certificates.authority, host=host), name="t") as bus:
        await bus.check_jetstream()
        await bus.client.force_reconnect()
        await until(lambda: bus.generation == 1 and bus.is_connected)
        await bus.check_jetstream()


async def test_what_is_held_in_memory_is_enough_to_come_back_when_the_files_are_out_of_reach(
    certificates: TlsFiles, tmp_path: Path
) -> None:
    key = ensure_keys(tmp_path / "keys", ["runner"])["runner"]
    server = Server(tmp_path, extra=f"{_tls(certificates)}\nauthorization {{ users: [{{nkey: {key.public}}}] }}")
    server.start()
    try:
        authority = tmp_path / "ca.crt"
        authority.write_bytes(certificates.authority.read_bytes())
        settings = _settings(server, authority).model_copy(update={"nats_key_file": key.seed_path})
        held = HeldAccess.read(settings)
        authority.unlink()
        key.seed_path.unlink()
        bus = Bus(settings, name="t", inbox="_INBOX", access=held)
        await bus.connect()
        try:
            server.kill()
            server.start()
            await until(lambda: bus.generation == 1 and bus.is_connected)
            await bus.check_jetstream()
        finally:
            await bus.close()
        with pytest.raises(NotAuthorized):
            await Bus(settings, name="t", inbox="_INBOX").connect()
        assert "SU" not in repr(held)
    finally:
        server.stop()


async def test_a_server_of_another_name_or_another_authority_is_refused(secured: Server, tmp_path: Path) -> None:
    others = TlsFiles(tmp_path / "others")
    ensure_certificates(others, HOSTS)
    for ca_file in (None, others.authority):
        with pytest.raises(BusUnavailable, match="certificate"):
            async with Bus.open(_settings(secured, ca_file), name="t"):
                pass


async def test_a_certificate_for_other_names_is_refused(certificates: TlsFiles, tmp_path: Path) -> None:
    mine = TlsFiles(tmp_path / "tls")
    ensure_certificates(mine, ["nats.example.com"])
    server = Server(tmp_path, extra=_tls(mine))
    server.start()
    try:
        with pytest.raises(BusUnavailable, match="not valid for"):
            async with Bus.open(_settings(server, mine.authority), name="t"):
                pass
    finally:
        server.stop()


async def test_a_server_that_offers_no_tls_is_refused_where_the_url_wants_it(
    server: Server, certificates: TlsFiles
) -> None:
    with pytest.raises(BusUnavailable, match="offers no TLS"):
        async with Bus.open(_settings(server, certificates.authority), name="t"):
            pass


async def test_a_file_without_certificates_is_a_bad_setting(server: Server, tmp_path: Path) -> None:
    (tmp_path / "empty.crt").write_text("")
    for path in (tmp_path / "empty.crt", tmp_path / "missing.crt"):
        with pytest.raises(BadSetting, match="RAILBUS_NATS_CA_FILE"):
            async with Bus.open(_settings(server, path), name="t"):
                pass


async def test_an_open_connection_is_said_in_the_log_at_every_start(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """`0.0.0.0` is this host as well, but nobody can tell that from the URL."""
    settings = CommonSettings(nats_url=f"nats://0.0.0.0:{server.port}", insecure=True)
    for number in (1, 2):
        async with Bus.open(settings, name="t"):
            found = [one for one in caplog.records if "not encrypted" in one.message and one.levelno == logging.WARNING]
            assert len(found) == number
    async with Bus.open(CommonSettings(nats_url=server.url, insecure=True), name="t"):
        assert len([one for one in caplog.records if "not encrypted" in one.message]) == 2


def test_private_keys_are_private_and_what_is_there_is_kept(certificates: TlsFiles, tmp_path: Path) -> None:
    for key in (certificates.authority_key, certificates.server_key):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        assert "PRIVATE KEY" in key.read_text()
    where = TlsFiles(tmp_path / "tls")
    assert ensure_certificates(where, ["a.example"])
    before = {path.name: path.read_bytes() for path in where.folder.iterdir()}
    assert not ensure_certificates(where, ["a.example"])
    assert {path.name: path.read_bytes() for path in where.folder.iterdir()} == before
    assert ensure_certificates(where, ["a.example", "::1"])
    assert where.authority.read_bytes() == before["ca.crt"]
    assert where.server.read_bytes() != before["server.crt"]


@pytest.mark.parametrize("host", ["", "a b", "a,DNS:evil", "-a", "a..b", "x" * 64, "é.example", "a\nb", "*.example"])
def test_what_is_no_host_name_is_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="neither"):
        ensure_certificates(TlsFiles(tmp_path / "tls"), [host])
