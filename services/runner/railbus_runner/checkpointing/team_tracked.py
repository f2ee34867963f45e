"""What a checkpoint of a job of several ranks holds: the state of rank 0, and of every rank what it has for itself.

Models and optimizers are alike on all ranks, or spread over them. Generators are not, and positions in the data need
not be: those of every rank stand under `ranks`, by rank.
"""

from __future__ import annotations

from typing import Final, cast

from railbus_runner.checkpointing.tracked import Tracked
from railbus_runner.team import Team

_OWN: Final = ("rng", "streams")


class TeamTracked(Tracked):
    """Of one rank; `state` is called by all of them, at the leader's order."""

    def __init__(self, team: Team) -> None:
        super().__init__()
        self._team = team

    def state(self, *, step: int) -> dict[str, object]:
        if self._team.is_leader:
            self._team.order("state")
        state = super().state(step=step)
        ranks = self._team.gathered({name: state[name] for name in _OWN})
        return {**state, "ranks": ranks}

    def take_own_view(self, state: dict[str, object]) -> None:
        """Put the generators of this rank into a state, and its positions if there are as many ranks as there were.

        A rank that there was not goes on with the generators of rank 0, as all ranks begin with the same.
        """
        ranks = cast("list[dict[str, object]]", state.get("ranks", []))
        own = ranks[self._team.rank] if self._team.rank < len(ranks) else {}
        names = _OWN if len(ranks) == self._team.world_size else ("rng",)
        state.update({name: own[name] for name in names if name in own})
