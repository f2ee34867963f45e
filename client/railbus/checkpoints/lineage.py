"""What exactly a checkpoint was trained on: the chain from datasets through jobs and parents to its bytes.

A meta names what it comes from by hashes. Each link is *proven* where what it names lies on this disk and has that
hash, *broken* where it lies there and has another one, and *unknown* where it is not there (any more), or where no hash
was written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import orjson

from railbus.checkpoints.catalogue import Checkpoint, read
from railbus.checkpoints.proof import Report, fault, silent
from railbus_shared.contracts.artifacts import CheckpointMeta, ModelSchema
from railbus_shared.contracts.jobs import JobRecord
from railbus_shared.errors import CheckpointCorrupt, WireError
from railbus_shared.layout import Layout, checkpoint_stem
from railbus_shared.plain_files import opened

Verdict = Literal["proven", "unknown", "broken"]
What = Literal["dataset", "schema", "model", "job", "parent", "file"]

_MAX_BYTES: Final = 256 << 20
"""Of an index or a schema."""


@dataclass(frozen=True)
class Link:
    """One thing that a checkpoint comes from."""

    what: What
    name: str
    verdict: Verdict
    said: str
    """Why it is proven or not, for people."""
    facts: dict[str, object] = field(default_factory=dict)
    """What is known of it, for programs."""

    def to_map(self) -> dict[str, object]:
        return {"what": self.what, "name": self.name, "verdict": self.verdict, "said": self.said, **self.facts}


@dataclass(frozen=True)
class Lineage:
    """A checkpoint with everything that it comes from."""

    one: Checkpoint
    ancestors: tuple[CheckpointMeta, ...]
    """As far as their metas are still there and each is proven to be the one that is meant; the nearest first."""
    links: tuple[Link, ...]
    """Datasets, jobs, parents from the first on, the model, and at last the checkpoint itself."""

    @property
    def verdict(self) -> Verdict:
        """Broken if any link is, else unknown if any is."""
        verdicts = {link.verdict for link in self.links}
        return "broken" if "broken" in verdicts else "unknown" if "unknown" in verdicts else "proven"

    def to_map(self) -> dict[str, object]:
        return {"verdict": self.verdict, "links": [link.to_map() for link in self.links]}


def lineage(
    layout: Layout,
    one: Checkpoint,
    *,
    records: Mapping[str, JobRecord] | None = None,
    hashes: bool = True,
    report: Report = silent,
) -> Lineage:
    """Follow every link of a checkpoint.

    Args:
        layout: where datasets and parents are looked for.
        one: the checkpoint.
        records: of its job and of those before, as far as they were asked for and are there.
        hashes: whether its own files are read whole and hashed.
        report: is told how much of that is done.
    """
    ancestors, parents = _parents(one)
    line = [one.meta, *ancestors]
    links = [
        *_datasets(layout, line),
        *_jobs(line, records or {}),
        *reversed(parents),
        _model(layout, one.meta),
        _file(one, hashes=hashes, report=report),
    ]
    return Lineage(one, tuple(ancestors), tuple(links))


def jobs_of(one: Checkpoint) -> list[str]:
    """Its own job and those that its line comes from, as far back as that can be followed; the newest first."""
    ancestors, _ = _parents(one)
    return list(dict.fromkeys(meta.job for meta in (one.meta, *ancestors)))


def parent_link(one: Checkpoint) -> tuple[Link | None, Checkpoint | None]:
    """The link to the parent, None if it began from nothing; and the parent, unless it is not the one that is meant."""
    meta = one.meta
    if meta.parent is None:
        return None, None
    facts: dict[str, object] = {"number": meta.parent, "sha256": meta.parent_sha256}
    verdict, said, parent = _parent(one, meta.parent)
    if parent is not None:
        facts |= {"step": parent.meta.step, "job": parent.meta.job, "actual_sha256": parent.meta_sha256}
    link = Link("parent", checkpoint_stem(meta.parent), verdict, said, facts)
    return link, parent if verdict != "broken" else None


def _parent(one: Checkpoint, number: int) -> tuple[Verdict, str, Checkpoint | None]:
    if number >= one.meta.number:
        return "broken", f"it is not older than {one.name}, which names it", None
    try:
        parent = read(one.path.with_name(f"{checkpoint_stem(number)}.meta.json"), model=one.meta.model)
    except FileNotFoundError:
        return "unknown", "gone, by retention or by hand; what came before it is not known", None
    except CheckpointCorrupt as exc:
        return "broken", f"its meta is damaged: {exc.details['actual']}", None
    if one.meta.parent_sha256 is None:
        return "unknown", f"{_where(parent)}; {one.name} holds no hash of it", parent
    if parent.meta_sha256 != one.meta.parent_sha256:
        return "broken", f"its meta is another one than {one.name} was made from: {_short(parent.meta_sha256)}", parent
    return "proven", _where(parent), parent


def _parents(one: Checkpoint) -> tuple[list[CheckpointMeta], list[Link]]:
    """The metas of the ancestors that are there, and a link to each, the nearest first."""
    metas: list[CheckpointMeta] = []
    links: list[Link] = []
    at: Checkpoint | None = one
    while at is not None:
        link, at = parent_link(at)
        links += [link] if link is not None else []
        metas += [at.meta] if at is not None else []
    return metas, links


def _where(parent: Checkpoint) -> str:
    began = "" if parent.meta.parent is not None else ", the first of the line"
    return f"step {parent.meta.step} of job {parent.meta.job}{began}"


def _datasets(layout: Layout, line: list[CheckpointMeta]) -> Iterator[Link]:
    """Every dataset that the line was trained on, the first one first."""
    for name, sha256 in dict.fromkeys((meta.dataset, meta.index_sha256) for meta in reversed(line)):
        yield from _dataset(layout, name, sha256)


def _dataset(layout: Layout, name: str, sha256: str) -> Iterator[Link]:
    facts: dict[str, object] = {"index_sha256": sha256}
    found = _index(layout, name, sha256)
    if found is None:
        there = _bytes(layout.index(name))
        said = (
            "not on this disk"
            if there is None
            else f"on this disk is another one, with the index {_short(_sha256(there))}"
        )
        yield Link("dataset", name, "unknown", said, facts)
        return
    path, index = found
    facts |= {"version": index.get("version", 1), "samples": index.get("samples"), "bytes": index.get("bytes")}
    facts["schema_sha256"] = index.get("schema_sha256")
    older = "" if path == layout.index(name) else ", kept beside the newer one"
    yield Link("dataset", name, "proven", f"version {facts['version']}, {facts['samples']} samples{older}", facts)
    schema = _bytes(path.with_name("schema.json"))
    actual = _sha256(schema) if schema is not None else None
    facts = {"schema_sha256": index.get("schema_sha256"), "actual_sha256": actual}
    if actual is None:
        yield Link("schema", name, "broken", "the dataset has no schema.json", facts)
    elif actual == index.get("schema_sha256"):
        yield Link("schema", name, "proven", "the one that the index names", facts)
    else:
        yield Link("schema", name, "broken", f"another one than the index names: {_short(actual)}", facts)


def _index(layout: Layout, name: str, sha256: str) -> tuple[Path, dict[str, object]] | None:
    """The index of this hash, of the dataset as it is or of an older version that was kept."""
    folder = layout.dataset(name)
    for path in (layout.index(name), *sorted(folder.glob("versions/*/index.json"), reverse=True)):
        data = _bytes(path)
        if data is not None and _sha256(data) == sha256:
            index = orjson.loads(data)  # it has the hash, so it is the one that was trained on
            return path, index if isinstance(index, dict) else {}
    return None


def _jobs(line: list[CheckpointMeta], records: Mapping[str, JobRecord]) -> Iterator[Link]:
    """Every job of the line, the first one first, by the last meta that it left."""
    last = {meta.job: meta for meta in reversed(line)}
    for job, meta in last.items():
        facts: dict[str, object] = {
            "spec_sha256": meta.spec_sha256,
            "entrypoint": meta.entrypoint,
            "git_commit": meta.git_commit,
            "seed": meta.seed,
            "params": meta.params,
            "libraries": meta.libraries,
        }
        yield _job(job, meta, facts, records.get(job))


def _job(job: str, meta: CheckpointMeta, facts: dict[str, object], record: JobRecord | None) -> Link:
    if meta.spec_sha256 is None:
        return Link("job", job, "unknown", "the meta holds no hash of what it asked for", facts)
    code = f"{meta.entrypoint}, seed {meta.seed}" + (f", commit {meta.git_commit[:12]}" if meta.git_commit else "")
    if record is None:
        said = f"{code}; its spec is known by its hash alone"
        return Link("job", job, "unknown", said, facts)
    facts |= {"state": record.state, "spec": record.spec.to_map()}
    if record.spec_sha256 == record.spec.digest == meta.spec_sha256:
        return Link("job", job, "proven", f"{code}; its record has the hash, and is {record.state}", facts)
    return Link("job", job, "broken", f"its record asks for something else: {_short(record.spec.digest)}", facts)


def _model(layout: Layout, meta: CheckpointMeta) -> Link:
    path = layout.model_schema(meta.model)
    facts: dict[str, object] = {"sha256": meta.model_schema_sha256}
    data = _bytes(path)
    if data is None:
        return Link("model", meta.model, "unknown", "there is no model_schema.json", facts)
    actual = _sha256(data)
    facts["actual_sha256"] = actual
    if meta.model_schema_sha256 is None:
        return Link("model", meta.model, "unknown", "the meta holds no hash of model_schema.json", facts)
    if actual != meta.model_schema_sha256:
        return Link("model", meta.model, "broken", f"model_schema.json is another one: {_short(actual)}", facts)
    schema = schema_of(path)
    facts |= {"num_parameters": schema.num_parameters, "num_tensors": len(schema.parameters)} if schema else {}
    said = f"{schema.num_parameters:,} parameters in {len(schema.parameters)} tensors" if schema else "as it was"
    return Link("model", meta.model, "proven", said, facts)


def schema_of(path: Path) -> ModelSchema | None:
    """A model's schema; None if there is none, or none that can be read."""
    data = _bytes(path)
    try:
        return ModelSchema.parse(orjson.loads(data)) if data is not None else None
    except (WireError, orjson.JSONDecodeError):
        return None


def _file(one: Checkpoint, *, hashes: bool, report: Report) -> Link:
    expected = one.meta.files
    name = expected[0].file.partition("/")[0]
    facts: dict[str, object] = {"bytes": one.num_bytes, "sha256": expected[0].sha256, "meta_sha256": one.meta_sha256}
    if not hashes:
        return Link("file", name, "unknown", "not hashed", facts)
    bad = fault(one, report=report)
    if bad is not None:
        told = f"it should have {bad.details['expected']}, and has {bad.details['actual']}"
        return Link("file", name, "broken", told, facts)
    of_all = f" of {len(expected)} files" if len(expected) > 1 else ""
    return Link("file", name, "proven", f"every byte{of_all} is as the meta says", facts)


def _bytes(path: Path) -> bytes | None:
    """Of a plain file that is not too large; None for whatever else lies there, or nothing."""
    try:
        with opened(path.parent, path.name) as file:
            data = file.read(_MAX_BYTES + 1)
    except (FileNotFoundError, CheckpointCorrupt):
        return None
    return data if len(data) <= _MAX_BYTES else None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _short(sha256: str) -> str:
    return f"{sha256[:12]}…"
