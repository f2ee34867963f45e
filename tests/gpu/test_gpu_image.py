"""The image of a state whose tensors lie on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from railbus_runner.checkpointing.image import Image

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),  # the first use of CUDA in a process takes seconds
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch can use no GPU here"),
]


@pytest.mark.parametrize("is_pinned", [True, False])
def test_the_values_are_those_of_the_copy_and_the_places_those_of_torch_save(tmp_path: Path, is_pinned: bool) -> None:
    rows = torch.randn(3000, 3000, device="cuda")
    state: dict[str, object] = {
        "rows": rows,
        "tied": rows[7],
        "bfloat16": torch.randn(5, device="cuda").bfloat16(),
        "empty": torch.empty(0, device="cuda"),
        "host": torch.arange(4),
    }
    before = {name: value.cpu() for name, value in state.items() if isinstance(value, torch.Tensor)}
    image = Image.of(state)
    straight = b"".join(image.chunks())
    arena = torch.empty(image.nbytes, dtype=torch.uint8, pin_memory=is_pinned)
    image.copy_to(arena)
    rows.zero_()
    assert arena.numpy().tobytes() == straight
    (tmp_path / "x.pt").write_bytes(straight)
    there = torch.load(tmp_path / "x.pt", weights_only=True)
    here = torch.load(tmp_path / "x.pt", weights_only=True, mmap=True, map_location="cpu")
    assert {name: value.device.type for name, value in there.items()} == {
        **dict.fromkeys(("rows", "tied", "bfloat16", "empty"), "cuda"),
        "host": "cpu",
    }
    for name, value in before.items():
        assert torch.equal(here[name], value)
        assert torch.equal(there[name].cpu(), value)
    assert there["rows"].untyped_storage().data_ptr() == there["tied"].untyped_storage().data_ptr()
