"""What was trained on, what changed, and weights for other programs: from files of torch with tensors of every kind."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from checkpoint_trees import MODEL, Net, Tree, spec_of, tensors_of, write_meta
from commands import Done, railbus_here
from railbus.checkpoints import dtypes
from railbus.checkpoints.catalogue import find
from railbus.checkpoints.lineage import lineage
from railbus_shared import files
from railbus_shared.contracts.jobs import JobRecord
from railbus_shared.layout import Layout

TABLE = 3
"""The checkpoint whose meta has a table of its tensors; the others have none, as an older railbus wrote them."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """Three checkpoints of a line whose jobs are two; the last of them is of what no model is trained with."""
    tree = Tree(tmp_path_factory.mktemp("trees") / "learning")
    for number, job in ((1, "j-1"), (2, "j-1"), (TABLE, "j-2")):
        tree.step()
        tree.write(number, job=job, parent=number - 1 or None, has_table=number == TABLE)
    return tree


@pytest.fixture
def tree(made: Tree, tmp_path: Path) -> Path:
    """A copy to be changed; the folder that the root lies in."""
    shutil.copytree(made.layout.root, tmp_path / "learning")
    return tmp_path


def run(tree: Path, *words: str) -> Done:
    return railbus_here("checkpoints", *words, cwd=tree)


def told(tree: Path, *words: str) -> dict[str, Any]:
    done = run(tree, *words, "--json")
    assert done.status == 0, done.err
    found = done.json()
    assert isinstance(found, dict)
    return found


def folder(tree: Path) -> Path:
    return Layout(tree / "learning").checkpoints(MODEL)


# --- the chain -------------------------------------------------------------------------------------------------------


def links(tree: Path, *words: str) -> list[tuple[str, str, str]]:
    return [(one["what"], one["name"], one["verdict"]) for one in told(tree, "show", *words)["lineage"]["links"]]


CHAIN = [
    ("dataset", "d", "proven"),
    ("schema", "d", "proven"),
    ("job", "j-1", "unknown"),
    ("job", "j-2", "unknown"),
    ("parent", "checkpoint-000001", "proven"),
    ("parent", "checkpoint-000002", "proven"),
    ("model", MODEL, "proven"),
    ("file", "checkpoint-000003.pt", "proven"),
]


def test_a_checkpoint_is_followed_from_its_dataset_to_its_bytes(tree: Path) -> None:
    assert links(tree, MODEL) == CHAIN
    assert links(tree, str(folder(tree) / "checkpoint-000003.pt")) == CHAIN
    shown = run(tree, "show", MODEL)
    assert "Nothing is broken. Not proven here: job j-1, job j-2. --ask compares jobs with their records." in shown.out
    assert "spec sha256" in shown.out


def test_of_a_long_line_of_parents_a_part_is_shown_and_all_are_followed(tree: Path) -> None:
    for number in range(4, 14):
        path = shutil.copy(folder(tree) / "checkpoint-000003.pt", folder(tree) / f"checkpoint-{number:06d}.pt")
        write_meta(Layout(tree / "learning"), Path(path), number, parent=number - 1)
    assert len([one for one in links(tree, MODEL) if one[0] == "parent"]) == 12
    shown = run(tree, "show", MODEL).out
    assert "… 6 more" in shown
    assert "from checkpoint-000002 to checkpoint-000007" in shown
    assert [f"parent     checkpoint-{number:06d} " in shown for number in (1, 2, 8, 12)] == [True, False, True, True]


def change_json(path: Path, **fields: object) -> None:
    path.write_bytes(files.to_json({**json.loads(path.read_bytes()), **fields}))


def append_version(root: Path) -> None:
    """What an append does: the index moves to where older versions are kept."""
    dataset = Layout(root).dataset("d")
    kept = dataset / "versions" / "000001"
    kept.mkdir(parents=True)
    for name in ("schema.json", "index.json"):
        shutil.copy(dataset / name, kept / name)
    change_json(dataset / "index.json", version=2)


HARM: dict[str, tuple[Callable[[Path, Path], object], tuple[str, str, str], str]] = {
    "a parent that is gone": (
        lambda _root, folder: (folder / "checkpoint-000002.meta.json").unlink(),
        ("parent", "checkpoint-000002", "unknown"),
        "gone, by retention",
    ),
    "a parent that is another": (
        lambda _root, folder: change_json(folder / "checkpoint-000002.meta.json", seed=8),
        ("parent", "checkpoint-000002", "broken"),
        "another one than checkpoint-000003 was made from",
    ),
    "a grandparent that is another": (
        lambda _root, folder: change_json(folder / "checkpoint-000001.meta.json", seed=8),
        ("parent", "checkpoint-000001", "broken"),
        "another one than checkpoint-000002 was made from",
    ),
    "a dataset that is gone": (
        lambda root, _folder: shutil.rmtree(Layout(root).dataset("d")),
        ("dataset", "d", "unknown"),
        "not on this disk",
    ),
    "a dataset that is another": (
        lambda root, _folder: change_json(Layout(root).index("d"), version=9),
        ("dataset", "d", "unknown"),
        "on this disk is another one",
    ),
    "a dataset that was appended to": (
        lambda root, _folder: append_version(root),
        ("dataset", "d", "proven"),
        "version 1, 20 samples, kept beside the newer one",
    ),
    "a schema that is another": (
        lambda root, _folder: change_json(Layout(root).schema("d"), description="changed"),
        ("schema", "d", "broken"),
        "another one than the index names",
    ),
    "a model that is another": (
        lambda root, _folder: change_json(Layout(root).model_schema(MODEL), created_by_job="j-9"),
        ("model", MODEL, "broken"),
        "model_schema.json is another one",
    ),
    "no model_schema.json": (
        lambda root, _folder: Layout(root).model_schema(MODEL).unlink(),
        ("model", MODEL, "unknown"),
        "there is no model_schema.json",
    ),
    "a flipped bit": (
        lambda _root, folder: flip(folder / "checkpoint-000003.pt"),
        ("file", "checkpoint-000003.pt", "broken"),
        "it should have sha256",
    ),
}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", HARM)
def test_each_link_is_told_where_it_is_unknown_or_broken(tree: Path, harm: str) -> None:
    change, link, said = HARM[harm]
    change(tree / "learning", folder(tree))
    found = [one for one in told(tree, "show", MODEL)["lineage"]["links"] if (one["what"], one["name"]) == link[:2]]
    assert [(one["what"], one["name"], one["verdict"]) for one in found] == [link]
    assert said in found[0]["said"]
    is_broken_chain = link[2] == "broken" and link[0] in {"parent", "file"}
    assert run(tree, "verify").status == (6 if is_broken_chain else 0)


def record_of(job: str, **spec: object) -> JobRecord:
    asked = spec_of(**spec)
    return JobRecord(id=job, spec=asked, spec_sha256=asked.digest, sequence=1, incarnation="4f09ac", submitted_at=TIME,
                     changed_at=TIME)  # fmt: skip


TIME = "2026-11-23T21:45:35.000000000Z"


@pytest.mark.parametrize(("params", "verdict"), [({"lr": 0.1}, "proven"), ({"lr": 0.2}, "broken")])
def test_a_job_is_proven_by_its_record_and_by_no_other(made: Tree, params: dict[str, float], verdict: str) -> None:
    one = find(made.layout, MODEL, 2, damaged=lambda _path, _error: None)
    found = lineage(made.layout, one, records={"j-1": record_of("j-1", params=params)})
    assert [link.verdict for link in found.links if link.what == "job"] == [verdict]
    assert found.verdict == verdict


def test_a_meta_of_an_older_railbus_is_followed_as_far_as_it_goes(tree: Path) -> None:
    path = folder(tree) / "checkpoint-000003.meta.json"
    meta = json.loads(path.read_bytes())
    for field in ("spec_sha256", "model_schema_sha256", "parent_sha256", "policy", "params", "tensors"):
        del meta[field]
    path.write_bytes(files.to_json(meta))
    found = links(tree, MODEL)
    assert {one for one in found if one[2] == "unknown"} == {
        ("job", "j-1", "unknown"),
        ("job", "j-2", "unknown"),
        ("parent", "checkpoint-000002", "unknown"),
        ("model", MODEL, "unknown"),
    }
    assert ("parent", "checkpoint-000001", "proven") in found


# --- comparing -------------------------------------------------------------------------------------------------------


def test_two_checkpoints_are_compared_number_by_number(made: Tree, tree: Path) -> None:
    found = told(tree, "diff", MODEL, "2", "3")
    assert (found["a"]["number"], found["b"]["number"], found["same"]) == (2, 3, False)
    assert found["meta"]["job"] == {"a": "j-1", "b": "j-2"}
    assert found["meta"]["metrics.loss"] == {"a": 0.5, "b": 0.333}
    a, b = dict(tensors_of(made.states[2])), dict(tensors_of(made.states[3]))
    changed = {one["tensor"]: one for one in found["changed"]}
    assert changed.keys() == {name for name in a if not torch.equal(a[name], b[name])}
    assert found["num_same"] + len(changed) == len(a)
    for name, one in changed.items():
        before, after = a[name].to(torch.float64), b[name].to(torch.float64)
        assert one["max_abs"] == pytest.approx((after - before).abs().max().item())
        assert one["relative"] == pytest.approx(((after - before).norm() / before.norm()).item())
        assert one["num_different"] == (a[name] != b[name]).sum().item()
    order = [one["relative"] for one in found["changed"]]
    assert order == sorted(order, reverse=True)


def test_a_number_alone_is_of_the_same_model_and_one_checkpoint_is_compared_with_its_parent(tree: Path) -> None:
    path = str(folder(tree) / "checkpoint-000002.meta.json")
    for words in (["3"], [MODEL], [], ["2", MODEL, "3"], [path]):
        found = told(tree, "diff", MODEL, *words)
        pair = (found["a"]["number"], found["b"]["number"])
        assert pair == {("3",): (2, 3), (MODEL,): (3, 3), (): (2, 3), (path,): (3, 2)}.get(tuple(words), (2, 3))
        assert found["same"] is (pair == (3, 3))


def test_a_table_for_people_is_limited_and_holds_one_part(tree: Path) -> None:
    shown = run(tree, "diff", MODEL, "2", "3", "--part", "model", "--limit", "2").out
    assert "\nmodel." in shown
    assert "optimizer" not in shown
    assert "… and 4 more; --limit 0 shows all" in shown
    assert shown.endswith("Tensors: 6 changed, 2 the same bit by bit.\n")
    assert "neither checkpoint has tensors of it" in run(tree, "diff", MODEL, "2", "3", "--part", "x").err


def write_states(tree: Path, a: dict[str, Any], b: dict[str, Any]) -> None:
    """Two checkpoints of these parts in place of the tree's last ones."""
    for number, parts in ((2, a), (3, b)):
        path = folder(tree) / f"checkpoint-{number:06d}.pt"
        torch.save({"parts": parts}, path)
        meta = path.with_name(f"checkpoint-{number:06d}.meta.json")
        file = {"file": path.name, "bytes": path.stat().st_size, "sha256": files.sha256_file(path)}
        change_json(meta, files=[file], tensors={})


def test_what_came_went_and_has_another_form_is_told(tree: Path) -> None:
    a = {"m": {"gone": torch.ones(1), "shape": torch.ones(2), "type": torch.ones(2), "nan": torch.tensor([1.0, 2, 3])}}
    b = {"m": {"new": torch.ones(1), "shape": torch.ones(3), "type": torch.ones(2, dtype=torch.bfloat16),
               "nan": torch.tensor([torch.nan, 2, torch.inf])}}  # fmt: skip
    a["m"] |= {"zero": torch.zeros(2), "sparse": torch.ones(2).to_sparse()}
    b["m"] |= {"zero": torch.tensor([0.0, 3]), "sparse": torch.ones(2).to_sparse()}
    write_states(tree, a, b)
    found = told(tree, "diff", MODEL, "2", "3")
    assert found["removed"] == [{"tensor": "parts.m.gone", "form": "float32[1]"}]
    assert found["added"] == [{"tensor": "parts.m.new", "form": "float32[1]"}]
    assert found["reshaped"] == [{"tensor": "parts.m.shape", "a": "float32[2]", "b": "float32[3]"}]
    assert found["not_compared"] == ["parts.m.sparse"]
    changed = {one["tensor"].removeprefix("parts.m."): one for one in found["changed"]}
    assert (changed["type"]["form"], changed["type"]["num_different"]) == ("float32 → bfloat16[2]", 0)
    nan = changed["nan"]
    assert (nan["num_different"], nan["num_not_finite"], nan["max_abs"]) == (2, 2, 0)
    assert (changed["zero"]["relative"], changed["zero"]["max_abs"]) == (None, 3)
    shown = run(tree, "diff", MODEL, "2", "3").out
    assert "from zero" in shown
    assert "2 not finite" in shown
    assert "3 changed, 1 added, 1 removed, 1 of another shape, 1 not compared" in shown


def test_tensors_are_found_without_torch_however_they_are_pickled(tree: Path) -> None:
    marked = torch.nn.Parameter(torch.arange(4.0))
    marked.note = "mine"  # type: ignore[attr-defined]
    base = torch.arange(12.0)
    kinds: dict[str, Any] = {
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "marked": marked,
        "view": base[3:7],
        "transposed": base.reshape(3, 4).t(),
        "expanded": torch.tensor([2.0]).expand(5),
        "eight bits": torch.arange(4.0).to(torch.float8_e4m3fn),
        "unsigned": torch.tensor([1, 65535], dtype=torch.uint16),
        "sparse": torch.ones(2).to_sparse(),
        "plain": [torch.Size([1]), torch.float32, torch.device("cpu"), {1, 2}, 1j, b"x", None, torch.tensor([5])],
        "a": {"b.c": torch.ones(1)},
        "a.b": {"c": torch.zeros(1)},
    }
    write_states(tree, {"model": {}}, {"model": kinds})
    refused = run(tree, "export", MODEL, "--safetensors", "out").err
    assert "tensor 'sparse' is not dense" in refused
    run(tree, "export", MODEL, "--safetensors", "out", *(f"--only={name}" for name in kinds if name != "sparse"))
    run(tree, "export", MODEL, "--safetensors", "rest", "--only", "plain.?")
    loaded = load_file(tree / "out")
    assert loaded.keys() == kinds.keys() - {"sparse", "plain", "a", "a.b"}
    for name, tensor in loaded.items():
        assert torch.equal(tensor.view(torch.uint8), kinds[name].detach().contiguous().view(torch.uint8)), name
    assert load_file(tree / "rest")["plain.7"].item() == 5
    assert "not dense" in run(tree, "export", MODEL, "--safetensors", "x", "--only", "a.b.c").err


def test_numbers_of_every_dtype_are_those_of_torch() -> None:
    noise = np.random.default_rng(0).integers(0, 256, 4096, dtype=np.uint8)
    for dtype, size in dtypes.ITEM_BYTES.items():
        raw = np.arange(256, dtype=np.uint8) if size == 1 else noise
        raw = raw % 2 if dtype == "bool" else raw
        expected = torch.from_numpy(raw.copy()).view(getattr(torch, dtype))
        with np.errstate(invalid="ignore"):
            found = dtypes.numbers(raw, dtype)
        wide = torch.complex128 if expected.dtype.is_complex else torch.float64
        np.testing.assert_array_equal(found, expected.to(wide).numpy(), err_msg=dtype)


# --- exporting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [2, TABLE])
def test_exported_weights_come_back_bit_by_bit_with_the_library(made: Tree, tree: Path, number: int) -> None:
    found = told(tree, "export", MODEL, str(number), "--safetensors", "out/weights.safetensors")
    path = tree / "out" / "weights.safetensors"
    assert (found["bytes"], found["sha256"]) == (path.stat().st_size, files.sha256_file(path))
    assert found["tied"] == {"head.weight": "embed.weight"}
    loaded = load_file(path)
    state = made.states[number]["parts"]
    assert isinstance(state, dict)
    expected = {name: one for name, one in state["model"].items() if name != "head.weight"}
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(loaded[name], tensor), name
    model = Net()
    missing, unexpected = model.load_state_dict(loaded, strict=False)
    assert (missing, unexpected) == (["head.weight"], [])
    assert torch.equal(model.head.weight, expected["embed.weight"])


def test_a_table_that_knows_a_part_of_the_tensors_hides_none(made: Tree, tree: Path) -> None:
    path = folder(tree) / "checkpoint-000003.meta.json"
    table = json.loads(path.read_bytes())["tensors"]
    names = {name for name, _ in tensors_of(made.states[TABLE])}
    assert names - table.keys() == {"parts.model.conv.weight", "parts.optimizer.state.3.exp_avg",
                                    "parts.optimizer.state.3.exp_avg_sq"}, "what is not contiguous"  # fmt: skip
    run(tree, "export", MODEL, "--safetensors", "all", "--all")
    assert load_file(tree / "all").keys() == names - {"parts.model.head.weight"}


def test_the_metadata_holds_the_chain(tree: Path) -> None:
    run(tree, "export", MODEL, "--safetensors", "w.safetensors")
    meta_path = folder(tree) / "checkpoint-000003.meta.json"
    meta = json.loads(meta_path.read_bytes())
    with safe_open(tree / "w.safetensors", framework="pt") as file:
        said = file.metadata()
    assert (said["format"], said["railbus.model"], said["railbus.step"]) == ("pt", MODEL, "30")
    assert said["head.weight"] == "embed.weight"
    assert said["railbus.meta_sha256"] == files.sha256_file(meta_path)
    assert said["railbus.sha256"] == meta["files"][0]["sha256"]
    assert [said[f"railbus.{key}"] for key in ("index_sha256", "spec_sha256")] == [
        meta["index_sha256"],
        meta["spec_sha256"],
    ]


def test_a_part_or_some_names_can_be_exported(tree: Path) -> None:
    run(tree, "export", MODEL, "--safetensors", "bias", "--only", "*.bias", "--only", "count")
    assert load_file(tree / "bias").keys() == {"conv.bias", "head.bias", "count"}
    run(tree, "export", MODEL, "--safetensors", "steps", "--part", "optimizer", "--only", "state.?.step")
    assert len(load_file(tree / "steps")) == 5
    assert "there are: model, optimizer" in run(tree, "export", MODEL, "--safetensors", "x", "--part", "ema").err
    assert "no tensor has such a name" in run(tree, "export", MODEL, "--safetensors", "x", "--only", "zzz").err
    assert not (tree / "x").exists()


def test_the_same_weights_give_the_same_bytes_and_nothing_is_overwritten(tree: Path) -> None:
    for name in ("one", "two"):
        assert run(tree, "export", MODEL, "--safetensors", name).status == 0
    assert (tree / "one").read_bytes() == (tree / "two").read_bytes()
    (tree / "two").write_bytes(b"mine")
    again = run(tree, "export", MODEL, "--safetensors", "two")
    assert (again.status, "it exists" in again.err) == (1, True)
    assert (tree / "two").read_bytes() == b"mine"


def test_a_damaged_checkpoint_is_neither_exported_nor_compared(tree: Path) -> None:
    flip(folder(tree) / "checkpoint-000003.pt")
    assert run(tree, "export", MODEL, "3", "--safetensors", "out").status == 6
    assert run(tree, "diff", MODEL, "2", "3").status == 6
    assert {path.name for path in tree.iterdir()} == {"learning"}


def test_an_export_that_fails_leaves_nothing(tree: Path) -> None:
    write_states(tree, {"model": {"w": torch.ones(3)}}, {"model": {"z": torch.ones(2, dtype=torch.complex128)}})
    refused = run(tree, "export", MODEL, "--safetensors", "out")
    assert (refused.status, "complex128[2], which safetensors cannot hold" in refused.err) == (1, True)
    write_states(tree, {"model": {"w": torch.ones(3)}}, {"model": {"w": torch.ones(2).to_sparse()}})
    assert "not dense" in run(tree, "export", MODEL, "--safetensors", "out").err
    assert {path.name for path in tree.iterdir()} == {"learning"}


def test_without_room_an_export_fails_whole(tree: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        done = run(tree, "export", MODEL, "--safetensors", "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (done.status, "error[STORAGE_FULL]" in done.err) == (1, True)
    assert {path.name for path in tree.iterdir()} == {"learning"}
    (tree / "file").touch()
    assert "no folder for it" in run(tree, "export", MODEL, "--safetensors", "file/out").err


def test_whatever_a_file_holds_it_is_read_or_refused(tree: Path) -> None:
    """Bytes that have the right hash and are not what torch writes."""
    whole = (folder(tree) / "checkpoint-000002.pt").read_bytes()
    at = whole.index(b"data.pkl")
    random = np.random.default_rng(0)
    for _ in range(150):
        data = bytearray(whole)
        for place in random.integers(at, len(data) if random.random() < 0.3 else at + 3000, random.integers(1, 4)):
            data[place % len(data)] = random.integers(256)
        path = folder(tree) / "checkpoint-000003.pt"
        path.write_bytes(data[: random.integers(at, len(data))] if random.random() < 0.1 else data)
        file = {"file": path.name, "bytes": path.stat().st_size, "sha256": files.sha256_file(path)}
        change_json(path.with_name("checkpoint-000003.meta.json"), files=[file], tensors={})
        done = run(tree, "diff", MODEL, "2", "3", "--json")
        assert done.status in {0, 1, 6}, done.err


class Bomb:
    """Pickles to a call."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch exploded",)


def test_a_pickle_that_would_do_something_does_nothing(tree: Path) -> None:
    write_states(tree, {"model": {"w": torch.ones(1)}}, {"model": {"w": torch.ones(1), "bomb": Bomb()}})
    done = run(tree, "export", MODEL, "--safetensors", "out")
    assert (done.status, "holds posix.system" in done.err) == (1, True)
    assert {path.name for path in tree.iterdir()} == {"learning"}


LIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "behind the end": lambda place: place.update(offset=1 << 40),
    "too few bytes": lambda place: place.update(bytes=4),
    "a larger shape": lambda place: place.update(shape=[1 << 40]),
    "an unknown dtype": lambda place: place.update(dtype="float7"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_table_that_says_what_cannot_be_is_refused(tree: Path, lie: str) -> None:
    state = {"model": {"w": torch.ones(8)}}
    write_states(tree, state, state)
    path = folder(tree) / "checkpoint-000003.meta.json"
    place: dict[str, Any] = {"dtype": "float32", "shape": [8], "offset": 64, "bytes": 32}
    LIES[lie](place)
    change_json(path, tensors={"parts.model.w": place})
    done = run(tree, "export", MODEL, "--safetensors", "out")
    assert done.status in {1, 6}
    assert "error[CHECKPOINT_CORRUPT]" in done.err or "error[NOT_SUPPORTED]" in done.err
