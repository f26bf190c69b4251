"""Training with `trainer.workers: [1, 2]` on a cluster that gains a node and loses it again."""

from __future__ import annotations

from pathlib import Path

import pytest

from allo_ray.train.job import RUN
from tests.cluster.conftest import LocalCluster
from tests.cluster.held_training import EVERY, check, train, write_rows

SIZES = [1, 2, 1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_worker_joins_with_a_node_and_goes_with_it(
    local_cluster: LocalCluster, tiny_llama: Path, tmp_path: Path
) -> None:
    """Batches 0 to 2 by one worker, 3 to 5 by two, 6 to 8 by one; each group goes on from the last one's checkpoint.

    A group trains its own batches alone and then waits to be replaced, so that the numbers hold on any machine.
    """
    write_rows(tmp_path / "rows.parquet", len(SIZES))
    checkpoints = tmp_path / "out" / RUN
    with local_cluster.driver(train, tmp_path / "log", tiny_llama, tmp_path, "[1, 2]", *SIZES) as driver:
        driver.wait_for((checkpoints / f"step-{EVERY:08d}").exists)
        local_cluster.run("add", "late", "--num-cpus", "2")
        driver.wait_for((checkpoints / f"step-{2 * EVERY:08d}").exists)
        local_cluster.run("kill", "late")
        driver.finish()
    facts = check(tiny_llama, tmp_path, SIZES)
    assert (facts["workers"], facts["resumed_at"]) == (1, 2 * EVERY)
