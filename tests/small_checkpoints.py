"""Checkpoints of some bytes whose metas are true, for tests that look at no tensors."""

from __future__ import annotations

import hashlib
from pathlib import Path

from railbus_shared import files
from railbus_shared.contracts.artifacts import CheckpointMeta
from railbus_shared.layout import Layout, checkpoint_stem


def write_checkpoint(layout: Layout, number: int, *, model: str = "digits-cnn", content: bytes = b"weights") -> Path:
    """A checkpoint whose meta is true; returns the path of its tensors."""
    folder = layout.checkpoints(model)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{checkpoint_stem(number)}.pt"
    path.write_bytes(content)
    meta = CheckpointMeta.parse(
        {
            "number": number,
            "model": model,
            "job": "j-4f09ac-1",
            "attempt": 1,
            "lease_epoch": 1,
            "step": number * 100,
            "epoch": number,
            "samples_seen": number * 6400,
            "entrypoint": "classifier",
            "seed": 0,
            "dataset": "digits",
            "index_sha256": "0" * 64,
            "devices": ["h-cpu0"],
            "precision": "float32",
            "libraries": {"torch": "2.13.0"},
            "metrics": {"accuracy": 0.97},
            "files": [{"file": path.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}],
            "created_at": "2026-11-23T21:45:35.000000000Z",
        }
    )
    (folder / f"{checkpoint_stem(number)}.meta.json").write_bytes(files.to_json(meta.to_map()))
    return path
