"""DeepSpeed behind the loop, on two ranks without Ray: ZeRO 0 to 3 give what one process of plain torch gives."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from allo_ray import tables
from allo_ray.config.train import TrainConfig, TrainerConfig
from allo_ray.neurons.selection import Selection
from allo_ray.train import checkpoint
from allo_ray.train.checkpoint import Progress
from allo_ray.train.forward import load_model
from allo_ray.train.loop import Plan, run
from allo_ray.train.zero import engine_config

CONFIG = TrainConfig(lr=1e-3, batch_size=8, dtype="float32", weight_decay=0.1)


@pytest.fixture(scope="module")
def left(
    tiny_qwen: Path, make_rows, with_reference, make_updater, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folder with the state after 3 steps by one process ("plain"), the selection, what `two_ranks_mixed` writes."""
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
            [sys.executable, "-W", "ignore", "-m", "tests.train.two_ranks_mixed", str(rank), *map(str, told)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=600)[0][-3000:] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
    checkpoint.save(folder / "plain", updater.state(), Progress())
    return folder


@pytest.fixture(scope="module")
def states(left: Path) -> dict[str, dict[str, torch.Tensor]]:
    """By name of the run: "plain", "zero<stage>", "resumed<stage>", ..."""
    return {folder.name: checkpoint.load(folder)[0] for folder in left.iterdir() if folder.is_dir()}


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


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_changes_nothing(states: dict[str, dict[str, torch.Tensor]], stage: int) -> None:
    """The third step from a checkpoint that was left without it, within 1e-6."""
    whole, offloaded = states[f"zero{stage}"], states[f"offloaded{stage}"]
    assert whole.keys() == offloaded.keys()
    assert int(offloaded["step"]) == 3
    for name in whole:
        torch.testing.assert_close(offloaded[name], whole[name], atol=1e-6, rtol=1e-6, msg=name)


@pytest.mark.parametrize("stage", [0, 3])
def test_neurons_of_one_layer(
    states: dict[str, dict[str, torch.Tensor]], left: Path, tiny_qwen: Path, stage: int
) -> None:
    """bf16, checkpointed activations, the head and the embedding frozen and plain: the selected entries are the values,
    rounded, every other one keeps its bits, sharded or not; and the values of ZeRO 0 and 3 agree within 1e-5."""
    state = states[f"mixed{stage}"]
    indices = Selection.load(left / "selection.safetensors").indices
    weights = load_file(left / f"weights{stage}.safetensors")
    moved = 0
    for name, start in load_model(tiny_qwen, torch.bfloat16).named_parameters():
        expected = start.detach().reshape(-1).clone()
        assert (f"{name}.values" in state) == (".layers.0." in name)
        if f"{name}.values" in state:
            expected[indices[name].long()] = state[f"{name}.values"].bfloat16()
            torch.testing.assert_close(
                state[f"{name}.values"], states["mixed0"][f"{name}.values"], atol=1e-5, rtol=0
            )
        assert torch.equal(weights[name].reshape(-1), expected), name
        moved += int((expected != start.reshape(-1)).sum())
    assert moved > 1000


def test_checkpointing_lets_zero_3_release_its_weights(left: Path) -> None:
    """Without it almost all gathered weights live on to the backward pass; with it the head's alone, and the last
    norm's, which come first there. The tiny Qwen's head holds 384 x 64 float32."""
    outlived = json.loads((left / "outlived.json").read_text())
    (without, whole), (checkpointed, _) = outlived["0"], outlived["1"]
    head = 384 * 64 * 4
    assert without > 0.75 * whole
    assert head <= checkpointed <= head + 64 * 4 < 0.25 * whole


def test_checkpointing_is_on_where_weights_are_sharded_unless_told() -> None:
    told = [TrainerConfig(zero_stage=3), TrainerConfig(zero_stage=3, gradient_checkpointing=False)]
    assert [trainer.checkpointing for trainer in (*told, TrainerConfig(zero_stage=2))] == [True, False, False]


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
