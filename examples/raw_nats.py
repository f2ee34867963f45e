"""A job from a program that knows nothing of railbus: JSON out, msgpack in, by a plain NATS client.

python examples/raw_nats.py [URL KEY_FILE]      by default those of the `railbus up` of ./learning
"""

import asyncio
import json
import secrets
import sys
from pathlib import Path

import msgpack
import nats


def where() -> tuple[str, str]:
    """The server's URL and the file with the nkey seed of a person."""
    if len(sys.argv) == 3:
        return sys.argv[1], sys.argv[2]
    bus = json.loads(Path("learning/.railbus/bus.json").read_bytes())
    return bus["url"], bus["user_key_file"]


async def main() -> None:
    url, key_file = where()
    client = await nats.connect(url, nkeys_seed=key_file)
    job = {"id": f"raw-{secrets.token_hex(3)}", "model": "digits-cnn", "dataset": "digits", "entrypoint": "classifier"}
    events = await client.subscribe(f"railbus.evt.job.{job['id']}.>")
    stored = await client.jetstream().publish("railbus.jobs.submit", json.dumps(job).encode())
    print("stored as number", stored.seq, "of the stream", stored.stream)
    async for message in events.messages:
        what = message.subject.rpartition(".")[2]
        print(what, msgpack.unpackb(message.data).get("data", ""))
        if what in {"succeeded", "failed", "cancelled", "rejected"}:
            break
    await client.close()


if __name__ == "__main__":
    asyncio.run(main())
