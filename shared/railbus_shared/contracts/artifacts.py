"""The JSON files of the canonical tree. Their JSON Schemas in `docs/agi_json_schema/` are generated from here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue

from railbus_shared.contracts.jobs import CheckpointPolicy
from railbus_shared.contracts.model import Contract, Count, EntrypointName, Id, Items, JsonMap, Name, Sha256, Time

Dtype = Literal[
    "bool",
    "uint8",
    "int8",
    "uint16",
    "int16",
    "uint32",
    "int32",
    "uint64",
    "int64",
    "float16",
    "bfloat16",
    "float32",
    "float64",
]
PayloadFormat = Literal["columns", "npy", "parquet", "raw"]
FileName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,127}$")]
"""A name in the same folder; no separators."""


CheckpointFileName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,127}(/[a-z0-9._][a-z0-9._-]{0,127})?$")]
"""A name beside the meta, or in a folder beside it."""


class Column(Contract):
    """One column of a dataset."""

    dtype: Dtype
    shape: Items[Count]
    """Of one sample, or of one item where the length varies; empty for a scalar."""
    variable_length: bool = False
    """Whether each sample has its own number of items, for instance of tokens, or of bytes of an image file."""
    encoding: str = Field(default="", pattern=r"^[a-z0-9.+-]{0,32}$")
    """How bytes are to be read, for instance `utf-8`, `json`, `jpeg`, `png`; empty for plain numbers."""
    description: str = ""
    num_classes: int | None = Field(default=None, ge=1)
    """For a column of class labels 0 to num_classes - 1."""
    labels: Items[str] = ()
    """Names of the classes, or of the symbols of a vocabulary, in the order of their numbers."""


class SampleRange(Contract):
    """Samples one after the other."""

    first: Count
    samples: int = Field(ge=1)


class Split(Contract):
    """Some of the samples, under a name."""

    first: Count
    samples: int = Field(ge=1)
    """How many there are in all."""
    ranges: Items[SampleRange] = ()
    """Where they lie, in order, if not in one run from `first`; a dataset that was appended to has several."""

    @property
    def runs(self) -> tuple[SampleRange, ...]:
        """Where the samples lie, in order."""
        return self.ranges or (SampleRange(first=self.first, samples=self.samples),)


class DatasetSchema(Contract):
    """`schema.json`: what a dataset is, apart from where its bytes lie."""

    format_version: Literal[1] = 1
    name: Name
    version: str = "1"
    description: str = ""
    licence: str = ""
    source: str = ""
    payload: PayloadFormat = "columns"
    columns: dict[Name, Column] = Field(min_length=1, max_length=256)
    splits: dict[Name, Split] = Field(min_length=1, max_length=64)
    created_at: Time | None = None
    """Left out where the same input must give the same bytes."""


class Extent(Contract):
    """Some bytes of a file, one after the other."""

    offset: Count
    """Bytes from the start of the file."""
    bytes: Count


class ColumnExtent(Contract):
    """Where one column of a shard lies in its payload."""

    offset: Count
    """Bytes from the start of the file."""
    bytes: Count
    offsets: Extent | None = None
    """Of a column of variable length: where each sample begins, counted in items, and where the last one ends.

    Little-endian int64 (samples + 1,), in the shard's sidecar if it has one, else in the same file.
    """


class Sidecar(Contract):
    """A file that belongs to a shard: the offsets of its columns of variable length."""

    file: FileName
    """Under `shards/`."""
    bytes: Count
    sha256: Sha256


class RowGroup(Contract):
    """Samples of a Parquet file that are decoded together."""

    samples: int = Field(ge=1)


class Shard(Contract):
    """One shard of an index."""

    file: FileName
    """Under `shards/`."""
    bytes: Count
    sha256: Sha256
    first_sample: Count
    samples: int = Field(ge=1)
    columns: dict[Name, ColumnExtent] = Field(default_factory=dict, max_length=256)
    """Of every column; empty in a Parquet file, which tells its own layout."""
    sidecar: Sidecar | None = None
    row_groups: Items[RowGroup] = ()
    """Of a Parquet file."""


class IndexFile(Contract):
    """`index.json`: the map of shards, offsets and hashes. Written last: it is the commit of a dataset."""

    format_version: Literal[1] = 1
    dataset: Name
    version: int = Field(default=1, ge=1)
    """Raised by every append; older versions stay readable."""
    parent_sha256: Sha256 | None = None
    """Of the `index.json` that this version was made from by an append."""
    schema_sha256: Sha256
    """Of the bytes of `schema.json`."""
    payload: PayloadFormat = "columns"
    samples: int = Field(ge=1)
    bytes: Count
    shards: Items[Shard] = Field(min_length=1)


class Parameter(Contract):
    """One tensor of a model's state."""

    dtype: str
    shape: Items[Count]
    trainable: bool = True


class ModelSchema(Contract):
    """`model_schema.json`: written with the first checkpoint of a model."""

    format_version: Literal[1] = 1
    model: Name
    entrypoint: EntrypointName
    params: JsonMap = Field(default_factory=dict)
    dataset: Name
    index_sha256: Sha256
    """The dataset index that the first checkpoint was trained on."""
    num_parameters: Count
    parameters: dict[str, Parameter]
    """Every tensor of the model's `state_dict`, by name."""
    libraries: dict[str, str]
    """Versions: python, torch, numpy, railbus."""
    created_by_job: Id
    created_at: Time


class CheckpointFile(Contract):
    """One file of a checkpoint."""

    file: CheckpointFileName
    bytes: Count
    sha256: Sha256


class TensorPlace(Contract):
    """Where the elements of one dense, contiguous tensor lie in a checkpoint's first file."""

    dtype: str
    shape: Items[Count]
    offset: Count
    """Bytes from the start of the file."""
    bytes: Count


class CheckpointMeta(Contract):
    """`checkpoint-000123.meta.json`: the commit record of a checkpoint; without a valid one it does not exist."""

    format_version: Literal[1] = 1
    format: Literal["torch", "dcp"] = "torch"
    """`torch`: the first file is one of `torch.save`. `dcp`: a folder of `torch.distributed.checkpoint`."""
    number: int = Field(ge=1)
    model: Name
    job: Id
    attempt: int = Field(ge=1)
    lease_epoch: int = Field(ge=1)
    step: Count
    epoch: Count
    """Of the data."""
    samples_seen: Count
    entrypoint: EntrypointName
    seed: Count
    dataset: Name
    index_sha256: Sha256
    devices: Items[Id]
    world_size: int = Field(default=1, ge=1)
    precision: str
    """Dtype of the parameters, or `mixed`."""
    libraries: dict[str, str]
    git_commit: str | None = None
    """Of the entrypoint's source, where it is known."""
    metrics: dict[str, JsonValue] = Field(default_factory=dict)
    """The latest value of each metric."""
    files: Items[CheckpointFile] = Field(min_length=1)
    tensors: dict[str, TensorPlace] = Field(default_factory=dict)
    """By where they stand in the state, for instance `parts.model.fc.weight`; in the format `torch` only, and not where
    there are very many: the file says so itself."""
    spec_sha256: Sha256 | None = None
    """Of what the job asked for (`JobSpec.digest`)."""
    params: JsonMap = Field(default_factory=dict)
    """The job's, as its entrypoint was given them."""
    policy: CheckpointPolicy | None = None
    """What the job asked for of its checkpoints; tools go by it where the job's record is out of reach."""
    model_schema_sha256: Sha256 | None = None
    """Of the bytes of `model_schema.json`."""
    parent: int | None = None
    """The number of the checkpoint that this attempt began from, or wrote before."""
    parent_sha256: Sha256 | None = None
    """Of the bytes of the parent's meta: through it the whole line of checkpoints is proven."""
    reason: Literal["policy", "end", "stop", "request"] = "policy"
    created_at: Time
