"""The built-in entrypoints learn, on real trainers and small real data."""

from __future__ import annotations

import inspect
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from railbus_runner.entrypoints import causal_lm, classifier
from railbus_runner.entrypoints.causal_lm import Gpt, lr_frac, sample
from railbus_runner.entrypoints.classifier import Task, build, find_task
from railbus_runner.frames import Commit, Frame
from railbus_shared.contracts.artifacts import Column
from railbus_shared.errors import BadParams
from trainers import Array, RunnerEnd, WarmHost, final_bits, plan, usual, write_dataset

pytestmark = pytest.mark.timeout(90)  # they train, on whatever cores are free

LABEL = Column(dtype="int64", shape=(), num_classes=10)
PIXELS = Column(dtype="float32", shape=(1, 8, 8))


def write_digits(root: Path, *, flat: bool = False) -> None:
    from sklearn.datasets import load_digits  # takes two seconds, which only these tests are to spend

    digits: Any = load_digits()
    order: Array = np.random.default_rng(0).permutation(len(digits.target))
    images = (digits.images[order] / 16).astype(np.float32)
    shape = (64,) if flat else (1, 8, 8)
    columns: dict[str, Array] = {"image": images.reshape(-1, *shape), "label": digits.target[order].astype(np.int64)}
    described = {"image": Column(dtype="float32", shape=shape), "label": LABEL}
    write_dataset(root, columns, described=described, splits={"train": 1437, "test": 360})


def write_text(root: Path, *, length: int = 65) -> None:
    """Sequences of characters of a source file of torch: the same wherever the same torch is."""
    text = inspect.getsource(torch.optim.lr_scheduler)
    labels = sorted(set(text))
    numbers: Array = np.array([labels.index(char) for char in text], dtype=np.uint16)
    rows = len(numbers) // length
    described = {"tokens": Column(dtype="uint16", shape=(length,), labels=tuple(labels))}
    tokens = numbers[: rows * length].reshape(rows, length)
    write_dataset(root, {"tokens": tokens}, described=described, splits={"train": rows - 100, "validation": 100})


def kill_after(num_commits: int) -> Callable[[RunnerEnd, Frame], Sequence[Frame]]:
    """A runner's end whose trainer is killed in place of an answer, once so many checkpoints were committed."""
    commits: list[Frame] = []

    def on_frame(end: RunnerEnd, frame: Frame) -> Sequence[Frame]:
        if isinstance(frame, Commit):
            if len(commits) == num_commits:
                end.kill()
                end.frames.remove(frame)  # never recorded
                return ()
            commits.append(frame)
        return usual(frame)

    return on_frame


def test_the_classifier_names_97_percent_of_the_digits_right(tmp_path: Path, warm: WarmHost) -> None:
    write_digits(tmp_path)
    end = RunnerEnd(warm, plan(tmp_path, "classifier"))
    assert end.run() == 0
    assert end.ended.metrics["accuracy"] >= 0.97  # type: ignore[operator]
    assert len(end.curve("accuracy")) == 12


def test_the_classifier_learns_from_flat_features_too(tmp_path: Path, warm: WarmHost) -> None:
    write_digits(tmp_path, flat=True)
    end = RunnerEnd(warm, plan(tmp_path, "classifier", params={"epochs": 8}))
    assert end.run() == 0
    assert end.ended.metrics["accuracy"] >= 0.95  # type: ignore[operator]


def test_the_language_model_learns_and_tells_a_sample(tmp_path: Path, warm: WarmHost) -> None:
    write_text(tmp_path)
    params = {
        "layers": 2,
        "heads": 2,
        "width": 64,
        "steps": 150,
        "eval_every": 75,
        "sample_chars": 60,
        "batch_size": 16,
    }
    end = RunnerEnd(warm, plan(tmp_path, "causal_lm", params=params))
    assert end.run() == 0
    losses = end.curve("validation_loss")
    assert len(losses) == 2
    assert losses[-1] < min(2.6, losses[0])  # a model that knows only how often each letter comes has 3.1
    (told,) = end.of_type("train.text")
    assert isinstance(told["data"], dict)
    assert (told["data"]["name"], len(str(told["data"]["text"]))) == ("sample", 60)


SMALL_GPT: dict[str, object] = {
    "layers": 1,
    "heads": 1,
    "width": 16,
    "steps": 40,
    "eval_every": 10,
    "sample_chars": 40,
    "dropout": 0.1,
}
BUILT_IN: dict[str, tuple[Callable[[Path], None], dict[str, object], str]] = {
    "classifier": (lambda root: write_digits(root, flat=True), {"epochs": 2}, "accuracy"),
    "causal_lm": (write_text, SMALL_GPT, "validation_loss"),
}


@pytest.mark.parametrize("entrypoint", BUILT_IN)
def test_killed_within_an_epoch_a_built_in_entrypoint_goes_on_to_the_same_bits(
    tmp_path: Path, warm: WarmHost, entrypoint: str
) -> None:
    """With dropout, AdamW and a scheduler; a pass has 23 steps of the classifier, and more of the language model."""
    write, params, metric = BUILT_IN[entrypoint]
    write(tmp_path)
    whole = RunnerEnd(warm, plan(tmp_path, entrypoint, params=params, job="j-whole"))
    whole.run()
    expected = final_bits(tmp_path)
    policy = {"every_steps": 10}
    begun = RunnerEnd(warm, plan(tmp_path, entrypoint, params=params, checkpoint=policy), on_frame=kill_after(3))
    assert begun.run() == -signal.SIGKILL
    resumed = RunnerEnd(warm, plan(tmp_path, entrypoint, params=params, attempt=2, recorded=begun.recorded))
    resumed.run()
    assert [event["step"] for event in resumed.of_type("checkpoint.resumed")] == [30]
    assert final_bits(tmp_path) == expected
    assert resumed.curve(metric) == whole.curve(metric)[-1:]
    assert [event["data"] for event in resumed.of_type("train.text")] == [
        event["data"] for event in whole.of_type("train.text")
    ]


@pytest.mark.parametrize(
    ("columns", "params", "found"),
    [
        ({"y": LABEL, "x": PIXELS}, {}, ("x", "y")),
        ({"n": Column(dtype="int64", shape=()), "x": PIXELS, "y": LABEL}, {}, ("x", "y")),
        ({"x": PIXELS, "z": PIXELS, "y": LABEL}, {"features": "z"}, ("z", "y")),
        ({"x": PIXELS, "y": LABEL, "w": LABEL}, {"label": "w"}, ("x", "w")),
    ],
)
def test_the_columns_to_learn_from_are_found(
    columns: dict[str, Column], params: dict[str, str], found: tuple[str, str]
) -> None:
    task = find_task(columns, classifier.Params.parse(params))
    assert (task.features, task.label) == found


@pytest.mark.parametrize(
    ("columns", "params", "field"),
    [
        ({"x": PIXELS}, {}, "label"),
        ({"x": PIXELS, "y": Column(dtype="int64", shape=())}, {}, "label"),
        ({"x": PIXELS, "y": LABEL}, {"label": "x"}, "label"),
        ({"y": LABEL}, {}, "features"),
        ({"x": PIXELS, "y": LABEL}, {"features": "y"}, "features"),
    ],
)
def test_a_dataset_without_them_is_refused_by_field(
    columns: dict[str, Column], params: dict[str, str], field: str
) -> None:
    with pytest.raises(BadParams, match=f"field '{field}'"):
        find_task(columns, classifier.Params.parse(params))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 28, 28), (1, 1, 1), (2, 3, 50), (64,), (5, 7), (1,)])
def test_a_net_is_built_for_every_shape(shape: tuple[int, ...]) -> None:
    net = build(Task(features="x", shape=shape, label="y", num_classes=4), classifier.Params(hidden=2))
    assert net(torch.zeros(3, *shape, dtype=torch.uint8)).shape == (3, 4)


def test_a_token_sees_only_what_came_before_it() -> None:
    torch.manual_seed(0)
    model = Gpt(11, 8, causal_lm.Params(layers=2, heads=2, width=8)).eval()
    tokens = torch.arange(8)[None]
    changed = tokens.clone()
    changed[0, 5] = 10
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_a_sample_is_the_same_for_a_seed_and_leaves_the_global_generator_alone() -> None:
    model = Gpt(3, 4, causal_lm.Params(layers=1, heads=1, width=4))
    state = torch.get_rng_state()
    texts = [sample(model, ("a", "b", "c"), num_tokens=20, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert texts[0] == texts[1] != texts[2]
    assert len(texts[0]) == 20
    assert len(sample(model, (), num_tokens=5, seed=0).split()) == 5


def test_the_learning_rate_rises_and_falls() -> None:
    params = causal_lm.Params(warmup=10, steps=100)
    fracs = [lr_frac(step, params) for step in range(120)]
    assert fracs[9] == fracs[10] == max(fracs) == 1.0
    assert fracs == [*sorted(fracs[:11]), *sorted(fracs[11:], reverse=True)]
    assert fracs[100] == fracs[119] == pytest.approx(0.1)
    assert lr_frac(0, causal_lm.Params(warmup=0)) == 1.0
