"""A node lost under a campaign: what was finished stays, what ran there runs again, and the result is the same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import yaml

from allo_ray.config.tune import load_campaign
from allo_ray.tune.records import Records, folder_of
from tests.cluster.conftest import LocalCluster
from tests.tune import stages
from tests.tune.conftest import CAMPAIGN

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def tune(file: str) -> None:
    """The driver of the campaign."""
    stages.main([file, "auto"])


def test_a_node_lost_under_a_campaign_costs_no_trial(local_cluster: LocalCluster, tmp_path: Path) -> None:
    """Two nodes have room for one learning trial each (2 of 3 CPUs). One is lost when a trial has
    finished and two more learn, and is not replaced: the trial that learned there is taken up by the other node."""
    places = {"store": str(tmp_path / "store"), "runs": str(tmp_path / "runs")}
    slow = {"learn.weight_decay": 4.0, "trainer": {"workers": 1, "num_cpus": 2, "num_gpus": 0}}
    told = CAMPAIGN | {"set": CAMPAIGN["set"] | places | slow}
    file = tmp_path / "campaign.yaml"
    file.write_text(yaml.safe_dump(told))
    campaign = load_campaign(file)

    def states() -> Counter[str]:
        return Counter(record.state for record in Records(folder_of(campaign)))

    local_cluster.run("add", "other", "--num-cpus", "3")
    with local_cluster.driver(tune, tmp_path / "log", file) as driver:
        driver.wait_for(lambda: states()["finished"] >= 1 and states()["running"] == 2)
        before = {one.number: one for one in Records(folder_of(campaign)) if one.state == "finished"}
        local_cluster.run("kill", "other")
        driver.finish()
    after = {one.number: one for one in Records(folder_of(campaign))}
    assert {number: after[number] for number in before} == before
    assert Counter(one.state for one in after.values()) == {"finished": 6}
    accuracy = {
        tuple(one.values.values()): one.scores["ALLO"]["held-out"]["accuracy"] for one in after.values()
    }
    # 0.5, + 0.2 less half of |k1 - 0.1| + |u - 0.9|, + 0.2 less half of |v - 0.2|: see tests/tune/stages.py.
    k1 = campaign.base.forget.k if campaign.base.forget else 0
    for (u, v), found in accuracy.items():
        exact = 0.9 - (abs(k1 - 0.1) + abs(float(u) - 0.9)) / 2 - abs(float(v) - 0.2) / 2
        assert found == pytest.approx(exact, abs=0.5 / stages.QUESTIONS + 1e-9)
