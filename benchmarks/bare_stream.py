"""A bare stream of chunks over NATS, for `remote_shard` to be held against: plain nats-py and credit.

python -m benchmarks.bare_stream URL PATH   sends the file to whoever asks

Without credit the server drops a receiver that falls behind, and nobody is told; so even a bare stream has it. Whoever
takes it hashes and writes what comes, in the callback, the way one would write it in a few lines.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
from pathlib import Path
from typing import Final

import nats
import uvloop
from nats.aio.client import Client
from nats.aio.msg import Msg

CHUNK: Final = 512 * 1024
WINDOW: Final = 16 << 20


async def send(url: str, path: Path) -> None:
    """Answer each request by the whole file, into the inbox that it names."""
    client = await nats.connect(url, max_reconnect_attempts=0)
    size = str(path.stat().st_size).encode()  # noqa: ASYNC240 - once

    async def asked(message: Msg) -> None:
        task = asyncio.ensure_future(_stream(client, path, message.data.decode()))
        await client.publish(message.reply, size)
        await task

    await client.subscribe("bare.ask", cb=asked)
    print("ready", flush=True)
    await asyncio.Event().wait()


async def _stream(client: Client, path: Path, inbox: str) -> None:
    granted, more = WINDOW, asyncio.Event()

    async def credit(message: Msg) -> None:
        nonlocal granted
        granted = int(message.data)
        more.set()

    subscription = await client.subscribe(f"bare.credit.{inbox}", cb=credit)
    await client.flush()
    with path.open("rb", buffering=0) as file:
        sent = 0
        while data := file.read(CHUNK):
            while sent + len(data) > granted:
                more.clear()
                await more.wait()
            await client.publish(inbox, data)
            sent += len(data)
            await asyncio.sleep(0)
    await subscription.unsubscribe()


async def receive(client: Client, into: Path, *, is_kept: bool) -> str:
    """Take the file; hashed and written if it `is_kept`, else thrown away."""
    inbox = client.new_inbox()
    digest, done, expected, got = hashlib.sha256(), asyncio.Event(), -1, 0
    with into.open("wb", buffering=0) as file:

        async def take(message: Msg) -> None:
            nonlocal got
            if is_kept:
                digest.update(message.data)
                file.write(message.data)
            got += len(message.data)
            if got % (WINDOW // 2) == 0:
                await client.publish(f"bare.credit.{inbox}", str(got + WINDOW).encode())
            if got == expected:
                done.set()

        subscription = await client.subscribe(inbox, cb=take)
        await client.flush()
        expected = int((await client.request("bare.ask", inbox.encode(), timeout=5)).data)
        if got != expected:
            await done.wait()
        await subscription.unsubscribe()
    return digest.hexdigest()


if __name__ == "__main__":
    uvloop.run(send(sys.argv[1], Path(sys.argv[2])))
