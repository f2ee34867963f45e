"""A shard that is cut while a trainer maps it: the trainer dies, the cause is told, the next one learns the shard."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import payloads
from railbus_runner.end_cause import end_cause
from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.readers import open_shard
from railbus_shared.errors import ShardCorrupt
from until import PATIENCE_S

READER = """
import sys
from pathlib import Path
import numpy as np
from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.readers import open_shard
folder = Path(sys.argv[1])
reader = open_shard(folder / "shards/shard-00000.data", DatasetIndex.load(folder), 0)
print("open", flush=True)
sys.stdin.readline()
reader.take("x", np.array([4999]), np.empty((1, 2, 3), np.float32))
"""


def test_a_file_that_is_cut_under_a_map_is_the_cause_that_is_told(tmp_path: Path) -> None:
    index = payloads.write(tmp_path / "d", "npy", sizes=(5000,))
    shard = tmp_path / "d/shards/shard-00000.data"
    command = [sys.executable, "-c", READER, str(tmp_path / "d")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        with shard.open("r+b") as file:
            file.truncate(4096)
        process.communicate("\n", timeout=PATIENCE_S)
    assert process.returncode == -signal.SIGBUS
    cause, error = end_cause(process.returncode, ended=None, stop=None, timed_out=False, lost_lease=False, oom_kills=0)
    assert cause == "signal"
    assert error is not None
    assert "a mapped file was cut" in error.message
    assert "railbus dataset verify" in error.hint
    with pytest.raises(ShardCorrupt, match="found 4096 bytes"):
        open_shard(shard, index, 0)
    assert DatasetIndex.load(tmp_path / "d") == index
