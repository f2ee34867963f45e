"""How each peer is used at its best for batches of 32 in one process: what it delivers are torch tensors.

Every function gives a function that begins an epoch and yields the size of each batch once it is there. Tokens are
tensors (batch, 2048) of int32; images are what the peer has for byte strings of different lengths, with their labels.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

BATCH: Final = 32
TOKENS: Final = 2048
_SEED: Final = 7
_BUFFER: Final = 10_000
"""Of the peers that shuffle in a buffer; larger ones are slower."""

Epoch = Callable[[], Iterator[int]]


def _order(samples: int, *, is_shuffled: bool) -> Any:
    return np.random.default_rng(_SEED).permutation(samples) if is_shuffled else np.arange(samples)


def _batches(samples: int, *, is_shuffled: bool) -> Iterator[Any]:
    order = _order(samples, is_shuffled=is_shuffled)
    for start in range(0, samples - BATCH + 1, BATCH):
        yield order[start : start + BATCH]


def gather(folder: Path, kind: str, *, is_shuffled: bool) -> Epoch:
    """What one writes by hand: one gather of torch for a batch, straight out of a mapped array."""
    values = torch.from_numpy(np.load(folder / f"{kind}.npy", mmap_mode="c"))
    if kind == "tokens":

        def tokens() -> Iterator[int]:
            for rows in _batches(len(values), is_shuffled=is_shuffled):
                yield len(torch.index_select(values, 0, torch.from_numpy(rows)))

        return tokens
    offsets, labels = np.load(folder / "offsets.npy"), torch.from_numpy(np.load(folder / "labels.npy"))

    def images() -> Iterator[int]:
        for rows in _batches(len(labels), is_shuffled=is_shuffled):
            packed = torch.cat([values[offsets[row] : offsets[row + 1]] for row in rows])
            chosen = labels[torch.from_numpy(rows)]
            yield len(chosen) if len(packed) else 0

    return images


class _Mapped(torch.utils.data.Dataset[Any]):
    def __init__(self, folder: Path, kind: str) -> None:
        self.values = np.load(folder / f"{kind}.npy", mmap_mode="r")
        self.offsets = None if kind == "tokens" else np.load(folder / "offsets.npy")
        self.labels = None if kind == "tokens" else np.load(folder / "labels.npy")

    def __len__(self) -> int:
        return len(self.values) if self.labels is None else len(self.labels)

    def __getitem__(self, row: int) -> Any:
        if self.offsets is None or self.labels is None:
            return np.array(self.values[row])
        return self.values[self.offsets[row] : self.offsets[row + 1]].tobytes(), int(self.labels[row])


def dataset(folder: Path, kind: str, *, is_shuffled: bool) -> Epoch:
    """`torch.utils.data` over a mapped array with the default collation, in process."""
    loader: Any = torch.utils.data.DataLoader(
        _Mapped(folder, kind), batch_size=BATCH, shuffle=is_shuffled, drop_last=True
    )
    return lambda: (_size(batch) for batch in loader)


def _size(batch: Any) -> int:
    return len(batch[1]) if isinstance(batch, (list, tuple)) else len(batch)


def litdata(folder: Path, kind: str, *, is_shuffled: bool) -> Epoch:
    """LitData, in process."""
    from litdata import StreamingDataLoader, StreamingDataset

    streaming = StreamingDataset(str(folder / f"litdata-{kind}"), shuffle=is_shuffled, drop_last=True)
    collate = None if kind == "tokens" else list
    loader = StreamingDataLoader(streaming, batch_size=BATCH, num_workers=0, drop_last=True, collate_fn=collate)
    return lambda: (len(batch) for batch in loader)


def mosaicml(folder: Path, kind: str, *, is_shuffled: bool) -> Epoch:
    """MosaicML Streaming from local MDS shards, in process."""
    _stand_in_for_torchvision()
    from streaming import StreamingDataset

    streaming = StreamingDataset(local=str(folder / f"mds-{kind}"), shuffle=is_shuffled, batch_size=BATCH)
    key = "tokens" if kind == "tokens" else "label"
    loader: Any = torch.utils.data.DataLoader(streaming, batch_size=BATCH, drop_last=True)
    return lambda: (len(batch[key]) for batch in loader)


def webdataset(folder: Path, kind: str, *, is_shuffled: bool) -> Epoch:
    """WebDataset from tar shards, with its usual buffer of 1000 samples."""
    import webdataset as wds

    urls = sorted(str(path) for path in (folder / f"wds-{kind}").glob("*.tar"))
    pipeline = wds.WebDataset(urls, shardshuffle=len(urls) if is_shuffled else False, empty_check=False)
    if is_shuffled:
        pipeline = pipeline.shuffle(1000)

    def epoch() -> Iterator[int]:
        batch: list[Any] = []
        for sample in pipeline:
            batch.append(sample["bin"])
            if len(batch) == BATCH:
                if kind == "tokens":
                    joined = np.frombuffer(b"".join(batch), np.int32).reshape(BATCH, TOKENS)
                    batch = list(torch.from_numpy(joined.copy()))
                yield len(batch)
                batch = []

    return epoch


def hf_datasets(folder: Path, kind: str, *, is_shuffled: bool) -> Epoch:
    """Hugging Face datasets, one batched index a batch."""
    from datasets import load_from_disk

    found: Any = load_from_disk(str(folder / f"hf-{kind}"))
    found = found.with_format("torch") if kind == "tokens" else found

    def epoch() -> Iterator[int]:
        for rows in _batches(len(found), is_shuffled=is_shuffled):
            batch = found[rows] if is_shuffled else found[int(rows[0]) : int(rows[-1]) + 1]
            yield len(batch["tokens" if kind == "tokens" else "label"])

    return epoch


def grain(folder: Path, kind: str, *, is_shuffled: bool) -> Epoch:
    """Google's grain over a mapped array, in process."""
    import grain as g

    source: Any = _Mapped(folder, kind)
    chosen = g.MapDataset.source(source)
    chosen = chosen.shuffle(seed=_SEED) if is_shuffled else chosen
    batched = chosen.batch(BATCH, drop_remainder=True, batch_fn=np.stack if kind == "tokens" else list)
    reading = g.ReadOptions(num_threads=0, prefetch_buffer_size=0)

    def epoch() -> Iterator[int]:
        for batch in batched.to_iter_dataset(reading):
            yield len(torch.from_numpy(batch)) if kind == "tokens" else len(batch)

    return epoch


def tf_data(folder: Path, kind: str, *, is_shuffled: bool) -> Epoch:
    """tf.data from TFRecord files, in process."""
    return _tf_epoch(_tf_pipeline(folder, kind, is_shuffled=is_shuffled), kind)


def tf_data_service(folder: Path, kind: str, *, is_shuffled: bool) -> Epoch:
    """The same served by a dispatcher and a worker in a process of their own: the closest architecture to ours."""
    import tensorflow as tf

    service = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.peers.tf_service"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert service.stdout is not None
    target = next(line for line in service.stdout if line.startswith("grpc://")).strip()
    distribute = tf.data.experimental.service.distribute(
        processing_mode=tf.data.experimental.service.ShardingPolicy.OFF, service=target
    )
    return _tf_epoch(_tf_pipeline(folder, kind, is_shuffled=is_shuffled).apply(distribute), kind)


def _tf_pipeline(folder: Path, kind: str, *, is_shuffled: bool) -> Any:
    import tensorflow as tf

    files = sorted(str(path) for path in (folder / f"tfrecord-{kind}").glob("*.tfrecord"))
    records: Any = tf.data.TFRecordDataset(files, buffer_size=8 << 20)
    if is_shuffled:
        records = records.shuffle(_BUFFER, seed=_SEED)
    records = records.batch(BATCH, drop_remainder=True)
    if kind == "tokens":
        records = records.map(lambda batch: tf.io.decode_raw(batch, tf.int32))
    return records.prefetch(tf.data.AUTOTUNE)


def _tf_epoch(pipeline: Any, kind: str) -> Epoch:
    def epoch() -> Iterator[int]:
        for batch in pipeline.as_numpy_iterator():
            yield len(torch.from_numpy(batch)) if kind == "tokens" else len(batch)

    return epoch


def _stand_in_for_torchvision() -> None:
    """MosaicML Streaming imports torchvision for datasets that are not used here, and no build of it fits our torch."""
    import importlib.util
    import types

    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        return
    from transformers.feature_extraction_utils import BatchFeature  # noqa: F401 - it asks whether there is one

    for name, wanted in (("", ()), (".datasets", ("VisionDataset", "CIFAR10")), (".transforms", ())):
        sys.modules[f"torchvision{name}"] = types.ModuleType(f"torchvision{name}")
        for one in wanted:
            setattr(sys.modules[f"torchvision{name}"], one, type(one, (), {}))
    functional = types.ModuleType("torchvision.transforms.functional")
    functional.to_tensor = None  # type: ignore[attr-defined]
    sys.modules[functional.__name__] = functional
