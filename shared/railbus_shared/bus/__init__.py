"""The bus: the only code that imports `nats`, and where its traps are covered.

What NATS and nats-py really do, and what this package does about it:

- a malformed header kills nats-py's read loop: `client.RailbusClient` parses headers without raising
- pings are too rare to notice a partition: every 3 s, two may be outstanding; a watchdog looks at the reader itself
- a protocol error closes the client for good: `Bus.run` raises, the process ends with 70, and is started again
- payloads near the server's limit count as a protocol error: they are capped at 512 KiB here
- a request may ask for its answer anywhere, for instance on a lease's key: answers go to known inboxes only, with
  headers of our own
- `kv.update` drops a lease's time-to-live: `bucket.Bucket.write` always states it
- a publish that timed out may have been stored: publishing repeats the same `Nats-Msg-Id`, writing re-reads
"""
