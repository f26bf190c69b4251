"""How a campaign's models differ by thirds of each parameter's range, and by rank, as Markdown.

    python -m benchmarks.thirds docs/campaign_trials.json
    python -m benchmarks.thirds runs/campaign [--json FILE]

`--json` keeps of a campaign's folder what this reads. A range is cut in its own scale. Rank correlations are
Spearman's, between a parameter and a metric of the last model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from allo_ray.config.space import Distribution
from allo_ray.config.tune import load_campaign
from allo_ray.tune.records import RESOLVED, Records

#: Models of a trial's own; the last one is the learned model.
MODELS = ("forgotten", "ALLO")


def kept(folder: Path) -> dict[str, Any]:
    """Space and scores of the finished trials of a campaign's folder."""
    space = {name: str(told.told()) for name, told in load_campaign(folder / RESOLVED).config.space.items()}
    trials = [
        {"values": record.values, "scores": record.scores}
        for record in Records(folder)
        if record.state == "finished"
    ]
    for trial in trials:
        trial["scores"] = {
            label: {
                suite: round(scores["kl" if suite == "kl" else "accuracy"], 4)
                for suite, scores in suites.items()
            }
            for label, suites in trial["scores"].items()
        }
    return {"space": space, "trials": trials}


def thirds(told: Distribution) -> np.ndarray:
    """The four ends of a range's thirds."""
    low, high = float(told.low), float(told.high)
    return np.geomspace(low, high, 4) if told.kind == "loguniform" else np.linspace(low, high, 4)


def ranks(values: Sequence[float]) -> np.ndarray:
    """Places in order; equal values share the mean of theirs."""
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[where]


def cell(trials: Sequence[dict[str, Any]], label: str) -> str:
    """Trials, then the mean of each metric of a model."""
    if not trials:
        return "0"
    of_model = [trial["scores"][label] for trial in trials]
    means = {name: float(np.mean([scores[name] for scores in of_model])) for name in of_model[0]}
    return f"{len(trials)}; " + ", ".join(
        f"{name} {mean:.2f}" if name == "kl" else f"{name} {100 * mean:.1f} %" for name, mean in means.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("campaign", type=Path)
    parser.add_argument("--json", type=Path)
    told = parser.parse_args()
    found = kept(told.campaign) if told.campaign.is_dir() else json.loads(told.campaign.read_text())
    if told.json:
        told.json.write_text(json.dumps(found, indent=None).replace('{"values"', '\n{"values"') + "\n")
    trials = found["trials"]
    print("| | lowest third | middle | highest |\n|---|---|---|---|")
    correlations = []
    for name, text in found["space"].items():
        ends = thirds(Distribution.model_validate(text))
        values = np.array([trial["values"][name] for trial in trials])
        place = np.clip(np.searchsorted(ends, values, side="right") - 1, 0, 2)
        for label in MODELS:
            cells = [
                cell([one for one, at in zip(trials, place, strict=True) if at == third], label)
                for third in range(3)
            ]
            print(f"| {name} ({', '.join(f'{end:.2g}' for end in ends)}), {label} | {' | '.join(cells)} |")
        last = [trial["scores"][MODELS[-1]] for trial in trials]
        told_of = {
            metric: np.corrcoef(ranks(values), ranks([one[metric] for one in last]))[0, 1]
            for metric in last[0]
        }
        correlations.append(f"| {name} | {' | '.join(f'{value:+.2f}' for value in told_of.values())} |")
    print(f"\n| rank correlation | {' | '.join(trials[0]['scores'][MODELS[-1]])} |")
    print("|---" * (1 + len(trials[0]["scores"][MODELS[-1]])) + "|")
    print("\n".join(correlations))


if __name__ == "__main__":
    main()
