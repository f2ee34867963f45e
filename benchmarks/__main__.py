"""Run benchmarks by name, or all of them.

python -m benchmarks [NAME [ARGUMENT...]]
"""

from __future__ import annotations

import importlib
import signal
import sys
from typing import Final

NAMES: Final = (
    "up_time",
    "latency",
    "many_jobs",
    "recovery",
    "train_throughput",
    "log_series",
    "log_closing",
    "log_reading",
    "telemetry",
    "data",
    "import_speed",
    "scheduler",
    "table_speed",
    "remote_shard",
    "remote_trainer",
    "stream_overhead",
    "checkpoint",
)


def main() -> int:
    """Run what the command line names; each benchmark reads its own arguments."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name and name not in NAMES:
        print(f"no benchmark is called {name!r}; there are: {', '.join(NAMES)}", file=sys.stderr)
        return 2
    del sys.argv[1:2]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended on the way out
    for chosen in [name] if name else NAMES:
        importlib.import_module(f"benchmarks.{chosen}").main()
        print(flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
