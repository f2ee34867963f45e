"""TensorBoard itself reads the run that every test of ours is compared with; it is one of the `peers`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PYTHON = HERE.parents[1] / ".venv-peers/bin/python"
READ = """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
run = EventAccumulator(sys.argv[1]).Reload()
curves = {tag: [[one.step, one.value] for one in run.Scalars(tag)] for tag in run.Tags()["scalars"]}
texts = {tag: [one.tensor_proto.string_val[0].decode() for one in run.Tensors(tag)] for tag in run.Tags()["tensors"]}
print(json.dumps([curves, texts]))
"""


@pytest.mark.peers
@pytest.mark.timeout(120)  # it imports for seconds, and several times that on a busy machine
@pytest.mark.skipif(not PYTHON.exists(), reason="needs .venv-peers, which `make bench-peers` makes")
def test_tensorboard_reads_curves_and_texts_and_forgets_what_was_done_again() -> None:
    run = HERE / "fixtures/tensorboard"
    done = subprocess.run([PYTHON, "-c", READ, str(run)], capture_output=True, text=True, timeout=110, check=True)
    curves, texts = json.loads(done.stdout.splitlines()[-1])
    assert curves == {
        "loss": [[1, 2.5], [200, 2.0], [201, 1.5]],
        "lr": [[1, 0.5], [200, 0.25]],
        "accuracy": [[201, 1.0]],
    }
    assert texts == {"sample": ["a **bold** word, 字"]}
