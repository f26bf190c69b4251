"""The main job over several seeds: mean accuracy of each model, mean gains, and the p-value of each run.

    python -m benchmarks.seeds --json FILE [--config quickstart] [--seeds 1 2 3] [--set KEY=VALUE ...]

Every seed is a run of its own, `allo align --config CONFIG --set seed=S --set name=CONFIG-S`: other samples, other
pairs, other orders of training, the same questions. What the store holds already is not computed again.

The standard deviation is that of single runs (n - 1 below the line), in points. A p-value is the exact McNemar test of
one run; the runs share their questions, so the p-values are not independent and are not combined.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from allo_ray.config.load import load
from allo_ray.results import KL

COMPARED = (("ALLO", "SFT"), ("DPO", "SFT"), ("ALLO", "DPO"))


def run(config: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """summary.json of one seed's run."""
    told = [f"seed={seed}", f"name={config}-{seed}", *overrides]
    words = [word for value in told for word in ("--set", value)]
    subprocess.run([sys.executable, "-m", "jobs.align", "--config", config, *words], check=True)
    return json.loads((Path(load(config, told).runs) / f"{config}-{seed}" / "summary.json").read_text())


def spread(values: list[float]) -> dict[str, Any]:
    """Mean and standard deviation of one figure over the seeds, with the figures themselves."""
    return {"mean": statistics.mean(values), "sd": statistics.stdev(values), "each": values}


def table(summaries: list[dict[str, Any]], suite: str) -> dict[str, Any]:
    """Accuracy and distance by model, gains and p-values by comparison."""
    models = {
        label: {
            "accuracy": spread([one["models"][label][suite]["accuracy"] for one in summaries]),
            KL: spread([one["models"][label][KL]["mean"] for one in summaries]),
        }
        for label in summaries[0]["models"]
    }
    gains = {}
    for a, b in COMPARED:
        found = [
            next(c for c in one["comparisons"] if (c["a"], c["b"], c["suite"]) == (a, b, suite))
            for one in summaries
        ]
        gains[f"{a} - {b}"] = {"gain": spread([c["gain"] for c in found]), "p": [c["p"] for c in found]}
    return {"models": models, "gains": gains}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    told = parser.parse_args()
    if len(told.seeds) < 2:
        parser.error("--seeds: a mean over seeds needs two of them at least")
    summaries = [run(told.config, seed, told.set) for seed in told.seeds]
    suites = [name for name in summaries[0]["models"]["SFT"] if name != KL]
    out = {
        "config": told.config,
        "seeds": told.seeds,
        "wall_seconds": [one["wall_seconds"] for one in summaries],
        "startup_seconds": [one["startup_seconds"] for one in summaries],
        "suites": {suite: table(summaries, suite) for suite in suites},
    }
    told.json.write_text(json.dumps(out, indent=1))
    for suite, found in out["suites"].items():
        print(f"\n{suite}, {len(told.seeds)} seeds")
        for label, facts in found["models"].items():
            accuracy, kl = facts["accuracy"], facts[KL]
            each = ", ".join(f"{100 * value:.1f}" for value in accuracy["each"])
            print(
                f"  {label:10} {100 * accuracy['mean']:5.1f} % +- {100 * accuracy['sd']:.1f}  ({each})"
                f"   KL {kl['mean']:.2f}"
            )
        for name, facts in found["gains"].items():
            each = ", ".join(
                f"{100 * gain:+.1f} (p {p:.2g})"
                for gain, p in zip(facts["gain"]["each"], facts["p"], strict=True)
            )
            print(
                f"  {name:10} {100 * facts['gain']['mean']:+5.1f} +- {100 * facts['gain']['sd']:.1f}   {each}"
            )


if __name__ == "__main__":
    main()
