"""Every loss by name, with what it needs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from allo_ray.errors import UserError
from allo_ray.losses.base import LossOutput
from allo_ray.losses.bco import bco
from allo_ray.losses.dpo import dpo, masked_dpo
from allo_ray.losses.ipo import ipo
from allo_ray.losses.npo import npo, npo_sequence
from allo_ray.losses.ppo import ppo
from allo_ray.losses.rdpo import rdpo
from allo_ray.losses.sft import sft
from allo_ray.losses.simpo import simpo


@dataclass(frozen=True)
class LossSpec:
    """A loss and what it reads.

    Attributes:
        function: (LossInputs, hyper-parameters by name) -> LossOutput.
        side: which responses it reads.
        needs_reference: whether it reads `LossInputs.reference`.
    """

    function: Callable[..., LossOutput]
    side: Literal["pair", "rejected", "chosen"]
    needs_reference: bool = True

    def check(self, args: Mapping[str, Any]) -> None:
        """Raises UserError for a hyper-parameter that the loss does not have."""
        known = [name for name in inspect.signature(self.function).parameters if name != "inputs"]
        for name in args:
            if name not in known:
                told = ", ".join(known) or "none"
                raise UserError(f"loss {self.function.__name__} has no argument {name}; it has: {told}.")


LOSSES: dict[str, LossSpec] = {
    "sft": LossSpec(sft, "chosen", needs_reference=False),
    "dpo": LossSpec(dpo, "pair"),
    "masked_dpo": LossSpec(masked_dpo, "pair"),
    "npo": LossSpec(npo, "rejected"),
    "npo_sequence": LossSpec(npo_sequence, "rejected"),
    "rdpo": LossSpec(rdpo, "pair"),
    "ipo": LossSpec(ipo, "pair"),
    "bco": LossSpec(bco, "pair"),
    "simpo": LossSpec(simpo, "pair", needs_reference=False),
    "ppo": LossSpec(ppo, "pair"),
    "ppo_a2c": LossSpec(ppo, "pair"),  # its rejected weights are 1 - P_re
}
