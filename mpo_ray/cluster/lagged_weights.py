"""Two earlier states of the trained weights, sharded: the lagged policy, and the one waiting to be it.

Every worker keeps whole parameters, each `world_size`-th one, in its own memory, whatever the ZeRO stage; the model
holds the lagged ones a second time, as frozen parameters, where its forward pass needs them.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from mpo_ray.cluster.deepspeed_engine import DeepSpeedEngine
from mpo_ray.training.lagged import LaggedModel

Share = dict[str, torch.Tensor]


class LaggedWeights:
    """The second and third set of weights of a policy, and their turn (design 2.4, eq. 13)."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        """From now on, the lagged and the waiting weights are what the trained ones are now. Collective."""
        assert isinstance(engine.wrapped, LaggedModel)
        self._engine, self._pairs = engine, engine.wrapped.lagged_pairs()
        self._lagged = self._waiting = self._trained()
        self._show()

    def turn(self) -> None:
        """The lagged policy becomes the waiting one, and that what is trained now. Collective.

        Called every t0 steps, the lagged policy becomes what was trained t0 steps ago.
        """
        self._lagged, self._waiting = self._waiting, self._trained()
        self._show()

    def save(self, directory: Path) -> None:
        """Write this worker's share: a checkpoint of the engine leaves frozen parameters out."""
        for name, share in (("lagged", self._lagged), ("waiting", self._waiting)):
            save_file(share, directory / f"{name}-{self._engine.rank}.safetensors")

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote. Collective."""
        self._lagged, self._waiting = (
            load_file(directory / f"{name}-{self._engine.rank}.safetensors") for name in ("lagged", "waiting")
        )
        self._show()

    def _trained(self) -> Share:
        """This worker's share of the trained weights, as the forward pass sees them."""
        share = {}
        for number, (name, trained, _) in enumerate(self._pairs):
            with self._engine.gathered(trained):
                if self._owner(number) == self._engine.rank:
                    share[name] = trained.detach().cpu().clone()
        return share

    def _show(self) -> None:
        """Put the lagged weights into the model, one parameter at a time."""
        for number, (name, _, lagged) in enumerate(self._pairs):
            self._set(lagged, self._lagged.get(name), self._owner(number))

    def _set(self, parameter: nn.Parameter, value: torch.Tensor | None, owner: int) -> None:
        with torch.no_grad(), self._engine.gathered(parameter, modifier=owner):
            if value is not None:
                parameter.copy_(value)
            if not hasattr(parameter, "ds_id"):  # sharded ones are sent as they are sharded again
                dist.broadcast(parameter.data, src=owner)

    def _owner(self, number: int) -> int:
        return number % self._engine.world_size
