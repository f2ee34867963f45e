"""What a checkpoint of a trainer holds, and that all of it comes back, or nothing has changed."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from railbus_runner.checkpointing.names import plain_state
from railbus_runner.checkpointing.state_file import open_state
from railbus_runner.checkpointing.tracked import Tracked
from railbus_shared.errors import Conflict, NotSupported

Make = Callable[[], nn.Module]


def net(width: int = 4, *, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2)).to(dtype)


def tracked(**parts: object) -> Tracked:
    found = Tracked()
    for name, part in parts.items():
        found.add_part(name, part)
    return found


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.rand(8, 3)).square().sum().backward()
        optimizer.step()


def restored(path: Path, state: dict[str, object], into: Tracked) -> dict[str, object]:
    """The state, after it has gone through a file into what is tracked."""
    torch.save(state, path)
    with open_state(path) as file:
        assert isinstance(file.state, dict)
        into.restore(file.state, values=file)
        into.restore_generators(file.state)
        return file.state


def image(value: object) -> object:
    """A state as values that compare."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), value.tolist())
    if isinstance(value, dict):
        return {key: image(item) for key, item in value.items()}
    return [image(item) for item in value] if isinstance(value, list | tuple) else value


# --- models and optimizers -------------------------------------------------------------------------------------------


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.1, amsgrad=True),
    "groups": lambda model: torch.optim.Adam(
        cast("Any", [{"params": list(model.parameters())[:1], "lr": 1.0}, {"params": list(model.parameters())[1:]}])
    ),
    "LBFGS": lambda model: torch.optim.LBFGS(model.parameters(), max_iter=1),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("steps_before", [0, 1])
def test_a_model_and_its_optimizer_come_back_into_the_live_tensors(
    tmp_path: Path, kind: str, steps_before: int
) -> None:
    def parts() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = net()
        return model, OPTIMIZERS[kind](model)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss: torch.Tensor = model(torch.linspace(0, 1, 24).view(8, 3)).square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        for _ in range(steps):
            optimizer.step(closure)  # type: ignore[arg-type]

    model, optimizer = parts()
    train(model, optimizer, 2)
    state = copy.deepcopy(tracked(model=model, optimizer=optimizer).state(step=2))
    other, other_optimizer = parts()
    train(other, other_optimizer, steps_before)
    before = [parameter.data_ptr() for parameter in other.parameters()]
    restored(tmp_path / "a.pt", state, tracked(model=other, optimizer=other_optimizer))
    (tmp_path / "a.pt").write_bytes(b"")
    assert [parameter.data_ptr() for parameter in other.parameters()] == before
    train(model, optimizer, 2)
    train(other, other_optimizer, 2)
    now = (model.state_dict(), optimizer.state_dict())
    assert image(now) == image((other.state_dict(), other_optimizer.state_dict()))


def test_every_kind_of_part_comes_back(tmp_path: Path) -> None:
    def parts() -> dict[str, Any]:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return {
            "model": model,
            "optimizer": optimizer,
            "scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=9),
            "scaler": torch.amp.GradScaler("cpu"),
            "average": torch.optim.swa_utils.AveragedModel(model),
        }

    there, here = parts(), parts()
    for _ in range(3):
        trained(there["model"], there["optimizer"], 1)
        there["scheduler"].step()
        there["average"].update_parameters(there["model"])
    there["scaler"].load_state_dict(there["scaler"].state_dict() | {"scale": 8.0})
    state = tracked(**there).state(step=3)
    restored(tmp_path / "a.pt", state, tracked(**here))
    assert image({name: part.state_dict() for name, part in here.items()}) == image(state["parts"])


class Compiled(nn.Module):
    """Names its state as what `torch.compile` gives; compiling itself would take seconds."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module


def partly_compiled() -> nn.Module:
    model = net()
    model[0] = Compiled(model[0])
    return model


WRAPPED: dict[str, Make] = {
    "plain": net,
    "parallel": lambda: nn.DataParallel(net()),
    "compiled": lambda: Compiled(net()),
    "both": lambda: Compiled(nn.DataParallel(net())),
    "partly": partly_compiled,
}


@pytest.mark.parametrize("there", WRAPPED)
@pytest.mark.parametrize("here", WRAPPED)
def test_a_model_comes_back_with_and_without_wrappers(tmp_path: Path, there: str, here: str) -> None:
    model, other = WRAPPED[there](), WRAPPED[here]()
    state = tracked(model=model).state(step=1)
    assert list(state["parts"]["model"]) == list(net().state_dict())  # type: ignore[index]
    restored(tmp_path / "a.pt", state, tracked(model=other))
    assert image(plain_state(other)) == image(plain_state(model))


def test_a_state_that_was_saved_with_its_wrapper_comes_back_too(tmp_path: Path) -> None:
    model, other = nn.DataParallel(net()), net()
    state = tracked(model=model).state(step=1) | {"parts": {"model": model.state_dict()}}
    restored(tmp_path / "a.pt", state, tracked(model=other))
    assert image(other.state_dict()) == image(model.module.state_dict())


class Translating(nn.Module):
    """Takes up states in which its weight has an older name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3))
        self.register_load_state_dict_pre_hook(self._translate)  # type: ignore[no-untyped-call]

    @staticmethod
    def _translate(_module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
        if f"{prefix}old" in state:
            state[f"{prefix}weight"] = state.pop(f"{prefix}old") * 2


def test_a_model_that_translates_older_states_is_let_do_so(tmp_path: Path) -> None:
    there = nn.Module()
    there.old = nn.Parameter(torch.ones(3))
    model = Translating()
    restored(tmp_path / "a.pt", tracked(model=there).state(step=1), tracked(model=model))
    assert model.weight.tolist() == [2, 2, 2]


# --- what does not fit -----------------------------------------------------------------------------------------------


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def two_groups(model: nn.Module) -> torch.optim.Optimizer:
    first, *others = model.parameters()
    return torch.optim.SGD([{"params": [first]}, {"params": others}], lr=0.1, momentum=0.9)


def deeper(layers: int) -> nn.Module:
    return nn.Sequential(*net(), *[nn.Linear(2, 2) for _ in range(layers)])


OTHERS: dict[str, tuple[Make, Callable[[nn.Module], torch.optim.Optimizer], str]] = {
    "wider": (
        lambda: net(5),
        sgd,
        r"model has 7 of another kind: 0\.bias is float32\[5\] there and float32\[4\] here, .*",
    ),
    "of another dtype": (lambda: net(dtype=torch.float64), sgd, r"0\.bias is float64\[4\] there and float32\[4\] here"),
    "deeper": (
        lambda: nn.Sequential(*net(), nn.Linear(2, 2)),
        sgd,
        r"model has 2 unexpected: 3\.weight, 3\.bias; optimizer",
    ),
    "shallower": (lambda: net()[:2], sgd, r"model has 2 missing: 2\.weight, 2\.bias"),
    "much deeper": (
        lambda: nn.Sequential(*net(), *[nn.Linear(2, 2) for _ in range(8)]),
        sgd,
        "16 unexpected: .* and 6 more",
    ),
    "in two groups": (net, two_groups, "optimizer has 1 of another kind: 2 parameter groups there and 1 here"),
    "of fewer parameters": (net, lambda model: sgd(model[0]), "group 0 has 2 parameters there and 6 here"),  # type: ignore[index]
    "another optimizer": (net, lambda model: torch.optim.AdamW(model.parameters()), "is of another optimizer: .*betas"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_checkpoint_of_another_model_is_refused_with_its_differences_and_nothing_changes(
    tmp_path: Path, kind: str
) -> None:
    make_model, make_optimizer, message = OTHERS[kind]
    there = make_model()
    optimizer_there = make_optimizer(there)
    here = net()
    optimizer_here = sgd(here)
    trained(here, optimizer_here)
    found = tracked(model=here, optimizer=optimizer_here)
    found.extras["a"] = 1
    before = image(found.state(step=0))
    with pytest.raises(Conflict, match=message) as caught:
        restored(tmp_path / "a.pt", tracked(model=there, optimizer=optimizer_there).state(step=1), found)
    assert "ctx.load" in caught.value.hint
    assert image(found.state(step=0)) == before


def test_a_later_format_is_refused_by_its_number(tmp_path: Path) -> None:
    found = tracked(model=net())
    with pytest.raises(NotSupported, match="format 2"):
        restored(tmp_path / "a.pt", found.state(step=1) | {"format": 2}, found)


# --- generators and extras -------------------------------------------------------------------------------------------


GENERATORS: dict[str, Callable[[int], Any]] = {
    "torch": lambda seed: torch.Generator().manual_seed(seed),
    "PCG64": np.random.default_rng,
    "MT19937": lambda seed: np.random.Generator(np.random.MT19937(seed)),
    "Philox": lambda seed: np.random.Generator(np.random.Philox(seed)),
    "Random": random.Random,
}


def draw(generator: Any) -> float:
    if isinstance(generator, torch.Generator):
        return torch.rand((), generator=generator).item()
    return float(generator.random())


@pytest.mark.parametrize("kind", GENERATORS)
def test_a_generator_of_the_entrypoint_goes_on_where_it_was(tmp_path: Path, kind: str) -> None:
    there, here = GENERATORS[kind](1), GENERATORS[kind](2)
    draw(there)
    restored(tmp_path / "a.pt", tracked(generator=there).state(step=1), tracked(generator=here))
    assert [draw(here) for _ in range(9)] == [draw(there) for _ in range(9)]


class Drawing:
    """A part that draws random numbers when it takes up its state."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, _state: object) -> None:
        draw(self.generator)
        torch.rand(3)


def test_generators_are_put_back_last(tmp_path: Path) -> None:
    generator = torch.Generator()
    found = tracked(generator=generator, drawing=Drawing(generator))
    state = copy.deepcopy(found.state(step=1))
    expected = [draw(generator), torch.rand(()).item()]
    restored(tmp_path / "a.pt", state, found)
    assert [draw(generator), torch.rand(()).item()] == expected


def test_another_number_of_gpus_is_told() -> None:
    found = tracked(model=net())
    state = found.state(step=1)
    assert found.restore_generators(state) == ""
    state["rng"] = {**state["rng"], "cuda": [torch.zeros(16, dtype=torch.uint8)] * 97}  # type: ignore[dict-item]
    assert found.restore_generators(state).startswith("those of CUDA are as seeded: 97 GPUs then, ")


def test_extras_come_back_and_what_is_not_plain_is_refused_by_its_place(tmp_path: Path) -> None:
    there, here = tracked(model=net()), tracked(model=net())
    there.extras.update(best=0.5, history=[1, 2], table={"x": torch.arange(3)})
    held = here.extras
    held["gone"] = 1
    restored(tmp_path / "a.pt", there.state(step=1), here)
    assert image(held) == {"best": 0.5, "history": [1, 2], "table": {"x": ("torch.int64", [0, 1, 2])}}
    held["table"] = {"x": np.float64(1)}
    with pytest.raises(TypeError, match=r"ctx\.extras\.table\.x holds .* float64.*put numbers, strings"):
        here.state(step=1)
