"""The loop on plain torch: golden losses, and what must not change a result."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from allo_ray.config.train import TrainConfig
from allo_ray.errors import UserError
from allo_ray.train import checkpoint
from allo_ray.train.checkpoint import Progress
from allo_ray.train.loop import Plan, learning_rate, run
from allo_ray.train.rows import Row
from allo_ray.train.updater import PlainUpdater
from tests.train.conftest import overflowing

CONFIG = TrainConfig(lr=1e-3, batch_size=8, dtype="float32", weight_decay=0.1)
WHOLE = 100_000


def cut(rows: list[Row], size: int = 8) -> list[list[Row]]:
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def plan_of(
    loss: str = "dpo", budget: int = WHOLE, config: TrainConfig = CONFIG, steps: int = 3, **args: Any
) -> Plan:
    return Plan(loss, args, config, steps, budget)


def values_of(updater: PlainUpdater) -> dict[str, torch.Tensor]:
    return {name: values.detach().clone() for name, values in updater.neurons.named_values()}


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("loss", ["dpo", "masked_dpo", "npo", "npo_sequence", "rdpo"])
def test_first_loss_is_ln_2(folder: Path, make_rows, with_reference, make_updater, loss: str) -> None:
    """All log-ratios are 0, so sigmoid(0) = 1/2: ln 2 for each pair; Eq. 7 has ln 2 for each weighted token.

    R-DPO's length term is switched off (alpha 0).
    """
    rows = with_reference(folder, make_rows(8))
    args: dict[str, Any] = {"alpha": 0.0} if loss == "rdpo" else {}
    progress = run(make_updater(folder, CONFIG), plan_of(loss, steps=1, **args), [rows], Progress())
    tokens = sum(len(row.rejected) for row in rows)
    wanted = math.log(2) * (tokens / 8 if loss == "npo" else 1)
    assert progress.metrics[0]["loss"] == pytest.approx(wanted, abs=1e-5 * max(1, wanted))


@pytest.mark.parametrize("normalize", ["instances", "tokens"])
def test_accumulation_equals_one_batch(
    folder: Path, make_rows, with_reference, make_updater, normalize: str
) -> None:
    """Micro-batches of 40 and of 100 tokens against one of everything, after three steps of which the last is short.

    Masked DPO: how many tokens are weighted is known only after the last forward pass.
    """
    config = CONFIG.model_copy(update={"normalize": normalize})
    rows = with_reference(folder, make_rows(22))
    found = []
    for budget in (40, 100, WHOLE):
        updater = make_updater(folder, config)
        progress = run(updater, plan_of("masked_dpo", budget, config, v=0.3), cut(rows), Progress())
        found.append((values_of(updater), [row["loss"] for row in progress.metrics]))
    for values, losses in found[:2]:
        assert losses == pytest.approx(found[2][1], abs=1e-5)
        assert furthest(values, found[2][0]) < 1e-5


def test_resumed_equals_uninterrupted_bit_for_bit(
    folder: Path, make_rows, with_reference, make_updater, tmp_path
) -> None:
    rows = with_reference(folder, make_rows(40))
    whole = make_updater(folder, CONFIG)
    reference = run(whole, plan_of(steps=5, budget=60), cut(rows), Progress())

    broken = make_updater(folder, CONFIG)
    reached = run(broken, plan_of(steps=5, budget=60), cut(rows)[:2], Progress())
    checkpoint.save(tmp_path / "step", broken.state(), reached)
    state, found = checkpoint.load(tmp_path / "step")
    fresh = make_updater(folder, CONFIG)
    fresh.load(state)
    resumed = run(fresh, plan_of(steps=5, budget=60), cut(rows)[2:], found)

    assert [row["loss"] for row in resumed.metrics] == [row["loss"] for row in reference.metrics]
    for one, other in zip(whole.state().items(), fresh.state().items(), strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1])


def test_unselected_neurons_stay_bit_identical(folder: Path, make_rows, with_reference, make_updater) -> None:
    """Under weight decay too; and the selected ones move."""
    updater: PlainUpdater = make_updater(folder, CONFIG)
    before = {tensor.name: tensor.weight.detach().clone() for tensor in updater.neurons.attached}
    run(updater, plan_of(), cut(with_reference(folder, make_rows(24))), Progress())
    moved = 0
    for tensor in updater.neurons.attached:
        changed = (tensor.weight.detach() != before[tensor.name]).flatten().nonzero()[:, 0]
        chosen = set(updater.neurons.selection.indices[tensor.name].tolist())
        assert set(changed.tolist()) <= chosen, tensor.name
        moved += len(changed)
    assert moved > 0.9 * updater.neurons.count


def test_dense_adamw_with_masked_gradients_gives_the_same_bits(
    folder: Path, make_rows, with_reference, make_updater
) -> None:
    """A tenth of the neurons as parameters, against AdamW on whole tensors whose other gradients are set to 0."""
    config = CONFIG.model_copy(update={"weight_decay": 0.0, "clip": None})
    rows = with_reference(folder, make_rows(24))
    sparse: PlainUpdater = make_updater(folder, config)
    dense: PlainUpdater = make_updater(folder, config, dense=True)
    dense.optimizer = torch.optim.AdamW(dense.neurons.parameters(), weight_decay=0.0)
    selection = sparse.neurons.selection

    def mask(name: str):
        def hook(gradient: torch.Tensor) -> torch.Tensor:
            kept = torch.zeros_like(gradient)
            chosen = selection.indices[name].long()
            kept[chosen] = gradient[chosen]
            return kept

        return hook

    for name, values in dense.neurons.named_values():
        values.register_hook(mask(name))
    for updater in (sparse, dense):
        run(updater, plan_of(config=config, budget=60), cut(rows), Progress())
    whole = values_of(dense)
    for name, values in sparse.neurons.named_values():
        assert torch.equal(values, whole[name][selection.indices[name].long()]), name


def test_cached_reference_equals_online(folder: Path, make_rows, with_reference, make_updater) -> None:
    """References computed beforehand, in batches of their own, are what the start model answers within the step."""
    rows = with_reference(folder, make_rows(8))
    progress = run(make_updater(folder, CONFIG), plan_of(budget=50, steps=1), [rows], Progress())
    for name in ("chosen_logratio", "rejected_logratio", "margin"):
        assert progress.metrics[0][name] == pytest.approx(0, abs=1e-5)


def test_a_batch_without_weighted_tokens_is_counted_and_skipped(
    tiny_llama: Path, make_rows, with_reference, make_updater
) -> None:
    rows = with_reference(tiny_llama, make_rows(24))
    for at in range(8, 16):
        rows[at] = replace(rows[at], rejected_weight=np.zeros(len(rows[at].rejected), dtype=np.float32))
    updater = make_updater(tiny_llama, CONFIG)
    progress = run(updater, plan_of("npo"), cut(rows), Progress())
    assert progress.skipped == 1
    assert progress.step == 3
    assert progress.metrics[1]["loss"] is None
    assert math.isfinite(progress.metrics[2]["loss"])
    assert int(updater.state()["step"]) == 2


def test_rows_without_weight_do_not_count_as_instances(
    tiny_llama: Path, make_rows, with_reference, make_updater
) -> None:
    """Of 8 rows one keeps its 2 first tokens: the loss is 2 ln 2 over 1 instance."""
    rows = with_reference(tiny_llama, make_rows(8, seed=4))
    weights = [np.zeros(len(row.rejected), dtype=np.float32) for row in rows]
    longest = max(range(8), key=lambda at: len(weights[at]))
    weights[longest][:2] = 1
    rows = [replace(row, rejected_weight=weight) for row, weight in zip(rows, weights, strict=True)]
    progress = run(make_updater(tiny_llama, CONFIG), plan_of("npo", budget=30, steps=1), [rows], Progress())
    assert progress.metrics[0]["loss"] == pytest.approx(2 * math.log(2), abs=1e-5)


def test_a_loss_that_is_not_finite_names_its_row_and_changes_nothing(
    tiny_llama: Path, make_rows, with_reference, make_updater
) -> None:
    rows = with_reference(tiny_llama, make_rows(8))
    rows[5] = replace(rows[5], chosen_reference=np.full(len(rows[5].chosen), np.nan, dtype=np.float32))
    updater = make_updater(tiny_llama, CONFIG)
    before = values_of(updater)
    with pytest.raises(UserError, match=r"step 0: the loss is not finite at the rows row5\."):
        run(updater, plan_of(budget=60), [rows], Progress())
    assert furthest(before, values_of(updater)) == 0


def test_a_gradient_that_is_not_finite_names_its_rows_and_changes_nothing(
    tiny_llama: Path, make_rows, with_reference, make_updater
) -> None:
    """Two of eight rows are `overflowing`; they share micro-batches with others, so the sums tell nothing apart."""
    rows = with_reference(tiny_llama, make_rows(8))
    for at in (2, 5):
        rows[at] = overflowing(rows[at])
    updater: PlainUpdater = make_updater(tiny_llama, CONFIG)
    before = values_of(updater)
    with pytest.raises(UserError, match=r"step 0: the gradient is not finite at the rows row2, row5\."):
        run(updater, plan_of(budget=60, beta=100.0), [rows], Progress())
    assert furthest(before, values_of(updater)) == 0
    assert updater.state()["step"] == 0


def test_clipping_scales_the_norm_of_the_selection(
    tiny_llama: Path, make_rows, with_reference, make_updater
) -> None:
    """SGD-like check through the moments: after one step exp_avg = 0.1 * gradient, whose norm is the clip."""
    config = CONFIG.model_copy(update={"clip": 0.01})
    updater: PlainUpdater = make_updater(tiny_llama, config)
    progress = run(
        updater, plan_of(config=config, steps=1), [with_reference(tiny_llama, make_rows(8))], Progress()
    )
    assert progress.metrics[0]["grad_norm"] > 0.01
    moments = [value for key, value in updater.state().items() if key.endswith("exp_avg")]
    assert float(torch.cat(moments).norm()) == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_learning_rate_by_hand() -> None:
    """10 steps, 20 % warm-up: 1/2, 1, then the cosine from 1 at step 2 to 0 at step 10; at step 6 it is half way."""
    config = TrainConfig(lr=2.0, warmup_ratio=0.2)
    rates = [learning_rate(config, step, 10) for step in range(10)]
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates[6] == pytest.approx(1.0)
    assert rates[9] == pytest.approx(1 + math.cos(math.pi * 7 / 8))
    constant = TrainConfig(lr=2.0, warmup_ratio=0, schedule="constant")
    assert [learning_rate(constant, step, 3) for step in range(3)] == [2.0, 2.0, 2.0]


def test_what_is_cut_off_while_it_is_written_is_not_there(tmp_path: Path) -> None:
    """The next attempt starts from an empty folder."""
    place = tmp_path / "result"

    def cut_off() -> None:
        with checkpoint.whole(place) as folder:
            (folder / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut_off()
    assert not place.exists()
    with checkpoint.whole(place) as folder:
        (folder / "all").touch()
    assert [file.name for file in place.iterdir()] == ["all"]


def test_checkpoints_are_asked_for_between_steps(
    tiny_llama: Path, make_rows, with_reference, make_updater
) -> None:
    rows = with_reference(tiny_llama, make_rows(10))
    asked: list[int] = []
    plan = replace(plan_of(steps=5), checkpoint_every=2)
    saver: Callable[[Progress], None] = lambda progress: asked.append(progress.step)  # noqa: E731
    run(make_updater(tiny_llama, CONFIG), plan, cut(rows, 2), Progress(), save=saver)
    assert asked == [2, 4]
