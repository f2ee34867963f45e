"""Values of a checkpoint get into the memory of a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from railbus_runner.checkpointing.filling import STAGING_BYTES
from railbus_runner.checkpointing.state_file import open_state
from railbus_runner.checkpointing.tracked import Tracked

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),  # the first use of CUDA in a process takes seconds
    pytest.mark.skipif(not torch.cuda.is_available(), reason=f"torch {torch.__version__} can use no GPU here"),
]


def tracked(device: str, *, steps: int) -> tuple[Tracked, torch.nn.Linear, torch.optim.AdamW]:
    model = torch.nn.Linear(2048, STAGING_BYTES // 2048 // 2 + 1, device=device)  # two buffers and a bit
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(steps):
        model(torch.ones(1, 2048, device=device)).sum().backward()
        optimizer.step()
    found = Tracked()
    found.add_part("model", model)
    found.add_part("optimizer", optimizer)
    return found, model, optimizer


@pytest.mark.parametrize("written_on", ["cpu", "cuda"])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_model_and_its_optimizer_are_restored_on_a_gpu(tmp_path: Path, written_on: str, steps_before: int) -> None:
    there, model, optimizer = tracked(written_on, steps=1)
    torch.save(there.state(step=1), tmp_path / "a.pt")
    here, other, other_optimizer = tracked("cuda", steps=steps_before)
    with open_state(tmp_path / "a.pt") as file:
        assert isinstance(file.state, dict)
        here.restore(file.state, values=file)
    assert torch.equal(other.weight.cpu(), model.weight.cpu())
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        for key, value in optimizer.state[one].items():
            found = other_optimizer.state[two][key]
            assert torch.equal(found.cpu(), value.cpu())
            assert found.device.type == ("cpu" if key == "step" else "cuda")
