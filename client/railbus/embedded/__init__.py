"""The embedded bus and the supervisor behind `railbus up`: one process that keeps nats-server and the services running.

Nothing here imports `nats`, `torch` or a service at import time. The supervisor is synchronous and single-threaded, so
that it may fork.
"""
