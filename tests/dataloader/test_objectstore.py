"""Files from object storage: a folder by `file://`, and a bucket of a local server that speaks S3."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import obstore
import pytest
from obstore.store import from_url

import railbus
import small_datasets
from railbus_dataloader import objectstore
from railbus_dataloader.objectstore import ObjectStoreSource
from railbus_dataloader.sources import WantedFile
from railbus_shared import files
from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.writer import append_dataset
from railbus_shared.errors import BadSetting, DatasetNotFound, NoSource, ShardCorrupt, TransferBroken
from railbus_shared.layout import Layout
from until import PATIENCE_S

pytestmark = pytest.mark.timeout(60)  # the server takes 5 to 20 s to start on a busy machine
AWS = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_REGION": "us-east-1", "AWS_ALLOW_HTTP": "true"}


@pytest.fixture(scope="module")
def s3_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with an empty bucket."""
    log = tmp_path_factory.mktemp("s3") / "log"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with log.open("wb") as output:
        command = [sys.executable, str(Path(__file__).with_name("s3_server.py")), str(port)]
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **AWS})
    url = f"http://127.0.0.1:{port}"
    try:
        _make_bucket(f"{url}/bucket", process, log)
        yield url
    finally:
        process.kill()
        process.wait(PATIENCE_S)


def _make_bucket(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Waits for the server, which takes a few seconds to import what it is made of."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="PUT"), timeout=5).close()  # noqa: S310 - our own
            return
        except OSError:
            assert time.monotonic() < deadline, log.read_text()
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)


@pytest.fixture(params=["file", "s3"])
def origin(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "file":
        (tmp_path / "origin").mkdir()
        return f"file://{tmp_path}/origin"
    for name, value in {**AWS, "AWS_ENDPOINT_URL": request.getfixturevalue("s3_url")}.items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{tmp_path.name}"


def upload(layout: Layout, origin: str, name: str = "d") -> None:
    store = from_url(origin)
    for path in sorted(layout.dataset(name).rglob("*")):
        if path.is_file():
            obstore.put(store, f"{name}/{path.relative_to(layout.dataset(name))}", path.read_bytes())


def wanted(index: DatasetIndex, number: int = 0) -> WantedFile:
    shard = index.file.shards[number]
    return WantedFile(index.schema.name, index.sha256, shard.file, shard.sha256, shard.bytes)


async def test_a_shard_comes_from_an_origin_range_by_range(
    origin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objectstore, "_RANGE_BYTES", 600_000)
    layout = Layout(tmp_path / "x")
    index = small_datasets.write(layout, 150_000)
    upload(layout, origin)
    source, want, into = ObjectStoreSource(origin), wanted(index), tmp_path / "got"
    found = await source.describe("d")
    assert found is not None
    assert found.index_sha256 == index.sha256
    await source.fetch(want, into)
    assert files.sha256_file(into) == want.sha256
    os.truncate(into, 1_000_001)
    await source.fetch(want, into)
    assert files.sha256_file(into) == want.sha256
    assert await source.describe("e") is None


def test_a_script_opens_a_dataset_in_a_bucket_and_its_shards_come_when_they_are_read(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**AWS, "AWS_ENDPOINT_URL": s3_url, "XDG_CACHE_HOME": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    layout, origin = Layout(tmp_path / "x"), f"s3://bucket/{tmp_path.name}"
    small_datasets.write(layout, 30, num_shards=3)
    upload(layout, origin)
    dataset = railbus.open_dataset(f"{origin}/d", split="train")
    assert [path.exists() for path in dataset.paths.values()] == [False] * 3
    assert dataset[29]["id"].item() == 29
    assert [path.exists() for path in dataset.paths.values()] == [False, False, True]
    seen = [batch["id"].tolist() for batch in dataset.stream(batch_size=10, shuffle=False)]
    assert [number for batch in seen for number in batch] == list(range(30))
    with pytest.raises(DatasetNotFound, match="no dataset lies there"):
        railbus.open_dataset(f"{origin}/e")


async def test_a_new_version_at_an_origin_is_seen_and_the_old_one_is_not_mixed_with_it(
    origin: str, tmp_path: Path
) -> None:
    old, new = Layout(tmp_path / "old"), Layout(tmp_path / "new")
    first, second = small_datasets.write(old, 10), small_datasets.write(new, 20)
    source = ObjectStoreSource(origin)
    upload(old, origin)
    await source.fetch(wanted(first), tmp_path / "first")
    upload(new, origin)
    found = await source.describe("d")
    assert found is not None
    assert found.index_sha256 == second.sha256
    with pytest.raises(NoSource, match="not this version"):
        await source.fetch(wanted(first), tmp_path / "again")


async def test_a_version_before_an_append_is_still_brought_by_its_hash(origin: str, tmp_path: Path) -> None:
    layout, source = Layout(tmp_path / "x"), ObjectStoreSource(origin)
    versions = [small_datasets.write(layout, 30)]
    versions += [append_dataset(layout, "d", [small_datasets.arrays(more)], split="train") for more in (40, 50)]
    upload(layout, origin)
    assert len(versions[2].file.shards) == 3
    for number, index in enumerate(versions):
        for shard in range(len(index.file.shards)):
            into = tmp_path / f"{number}-{shard}"
            await source.fetch(wanted(index, shard), into)
            assert files.sha256_file(into) == index.file.shards[shard].sha256
    unknown = dataclasses.replace(wanted(versions[0]), index_sha256="0" * 64)
    with pytest.raises(NoSource, match="not this version"):
        await source.fetch(unknown, tmp_path / "unknown")


async def test_wrong_bytes_at_an_origin_are_told_and_do_not_stay(origin: str, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "x")
    index = small_datasets.write(layout, 1000)
    small_datasets.flip(layout.shards("d") / "shard-00000.data")
    upload(layout, origin)
    with pytest.raises(ShardCorrupt, match="://"):
        await ObjectStoreSource(origin).fetch(wanted(index), tmp_path / "got")
    assert not (tmp_path / "got").exists()


async def test_an_origin_that_has_lost_a_shard_or_has_another_size_is_no_source(origin: str, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "x")
    index = small_datasets.write(layout, 1000)
    upload(layout, origin)
    path = "d/shards/shard-00000.data"
    obstore.put(from_url(origin), path, b"short")
    with pytest.raises(TransferBroken, match="5 bytes there"):
        await ObjectStoreSource(origin).fetch(wanted(index), tmp_path / "got")
    obstore.delete(from_url(origin), path)
    with pytest.raises(NoSource, match="shard-00000"):
        await ObjectStoreSource(origin).fetch(wanted(index), tmp_path / "got")


@pytest.mark.parametrize("url", ["file:///nonexistent/folder", "s3://nobody/x"])
async def test_an_origin_that_cannot_be_asked_says_why(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**AWS, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(NoSource, match=url):
        await ObjectStoreSource(url).describe("d")


@pytest.mark.parametrize("url", ["", "bucket/x", "ftp://host/x", "s3://", "file:///"])
def test_what_is_no_origin_is_a_bad_setting(url: str) -> None:
    with pytest.raises(BadSetting, match="RAILBUS_DATALOADER_ORIGINS"):
        ObjectStoreSource(url)
