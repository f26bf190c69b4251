"""DeepSpeed behind the loop, on two ranks without Ray: ZeRO 0 to 3 give what one process of plain torch gives."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from allo_ray import tables
from allo_ray.config.train import TrainConfig, TrainerConfig
from allo_ray.train import checkpoint
from allo_ray.train.checkpoint import Progress
from allo_ray.train.loop import Plan, run
from allo_ray.train.zero import engine_config

CONFIG = TrainConfig(lr=1e-3, batch_size=8, dtype="float32", weight_decay=0.1)


@pytest.fixture(scope="module")
def states(
    tiny_qwen: Path, make_rows, with_reference, make_updater, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, torch.Tensor]]:
    """State after 3 steps: "plain" by one process, "zero<stage>" and "resumed<stage>" by two ranks."""
    folder = tmp_path_factory.mktemp("two_ranks")
    rows = with_reference(tiny_qwen, make_rows(22))
    columns = {
        "id": "id",
        "prompt_ids": "prompt",
        "chosen_ids": "chosen",
        "rejected_ids": "rejected",
        "chosen_reference": "chosen_reference",
        "rejected_reference": "rejected_reference",
        "rejected_weight": "rejected_weight",
        "position": "position",
    }
    tables.TRAIN_ROWS.write(
        [{column: getattr(row, field) for column, field in columns.items()} for row in rows],
        folder / "rows.parquet",
    )
    updater = make_updater(tiny_qwen, CONFIG)
    updater.neurons.selection.save(folder / "selection.safetensors")
    batches = [rows[:8], rows[8:16], rows[16:]]
    run(updater, Plan("masked_dpo", {"v": 0.3}, CONFIG, 3, 80), batches, Progress())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    told = [port, tiny_qwen, folder / "rows.parquet", folder / "selection.safetensors", folder]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.train.two_ranks", str(rank), *map(str, told)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=600)[0][-3000:] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
    found = {"plain": updater.state()}
    for stage in range(4):
        for name in ("zero", "resumed"):
            found[f"{name}{stage}"], _ = checkpoint.load(folder / f"{name}{stage}")
    return found


@pytest.mark.parametrize("stage", range(4))
def test_two_ranks_equal_one_process(states: dict[str, dict[str, torch.Tensor]], stage: int) -> None:
    """Values and moments within 1e-5 after three steps, the last global batch being short."""
    one, two = states["plain"], states[f"zero{stage}"]
    assert one.keys() == two.keys()
    assert int(two["step"]) == 3
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("stage", range(4))
def test_resumed_ranks_keep_every_bit(states: dict[str, dict[str, torch.Tensor]], stage: int) -> None:
    whole, resumed = states[f"zero{stage}"], states[f"resumed{stage}"]
    assert whole.keys() == resumed.keys()
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name


def test_deepspeed_is_never_told_to_cast() -> None:
    """With fp16 or bf16 enabled it would cast the masters; without both it leaves every dtype alone."""
    for stage in (0, 1, 2, 3):
        told = engine_config(
            CONFIG, TrainerConfig.model_validate({"zero_stage": stage}), workers=2, sizes=[7, 5]
        )
        assert not {"fp16", "bf16", "torch_autocast"} & set(told)
        assert told["gradient_clipping"] == (1.0 if stage else 0.0)
        assert told["zero_optimization"]["stage"] == stage


def test_the_reduce_bucket_is_as_large_as_the_values() -> None:
    """All of them where they are few, the largest tensor where that is larger than the limit of 50 million."""

    def bucket(*sizes: int) -> int:
        told = engine_config(CONFIG, TrainerConfig(zero_stage=3), workers=2, sizes=sizes)
        return told["zero_optimization"]["reduce_bucket_size"]

    assert bucket(7, 5) == 12
    assert bucket(*[30_000_000] * 4) == 50_000_000
    assert bucket(60_000_000, 5) == 60_000_000


def test_one_worker_makes_no_copies_for_sharding() -> None:
    assert (
        engine_config(CONFIG, TrainerConfig(zero_stage=2), workers=1, sizes=[7, 5])["zero_optimization"][
            "stage"
        ]
        == 0
    )
    offloaded = TrainerConfig(zero_stage=2, offload_optimizer=True)
    assert engine_config(CONFIG, offloaded, workers=1, sizes=[7, 5])["zero_optimization"]["stage"] == 2
