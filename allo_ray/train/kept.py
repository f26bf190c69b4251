"""Which tokens of rejected responses the learning loss keeps (Eq. 8), under the policy as it is: for the report.

Shapes: R response tokens of all rejected responses, S of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from allo_ray.losses.noisy import keep
from allo_ray.train.batching import pack
from allo_ray.train.rows import Row
from allo_ray.train.updater import Updater

#: Rows that are recorded, and tokens of one forward pass.
RECORDED, TOKENS = 32, 2048


@torch.no_grad()
def kept_tokens(
    updater: Updater, rows: Sequence[Row], v: float, device: torch.device
) -> list[dict[str, Any]]:
    """Returns rows of KEPT for up to 32 rows: q (1 where a token is kept) and log-ratios, as long as the response.

    Collective where weights are sharded: every worker has to call it with the same rows.
    """
    chosen: list[Row] = []
    for row in rows[:RECORDED]:
        if sum(one.tokens("rejected") for one in [*chosen, row]) <= TOKENS or not chosen:
            chosen.append(row)
    part = pack(chosen, "rejected").to(device)
    logratio = updater.forward(part) - part.reference
    kept = keep(logratio, part.sequence, part.sequences, v)
    return [
        {"id": row.id, "q": kept[mine].float().tolist(), "logratio": logratio[mine].float().tolist()}
        for number, row in enumerate(chosen)
        for mine in [part.sequence == number]
    ]
