"""A campaign on paper: hours, storage and memory of many trials of a large model, by arithmetic.

    python -m benchmarks.campaign_estimate [--trials 512] [--neurons 7e9] [--gpus 64] [--flops 3.5e14] ...

Counted as the program works: sampling, warm-up, importances, reward model and token scores once; of each trial two
selections cut from the importances, two trained stages, the reference of the forgotten model, and an evaluation of two
models. A trial has one GPU. The bytes a neuron are those of `python -m benchmarks.memory`, the rate of ranking that of
a quickstart run. The other rates are arguments whose defaults are assumptions: nothing of this was measured on a GPU.

FLOPs a token: 2 N forward, 6 N forward and backward, 8 N with gradient checkpointing (N neurons; attention left out).
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass, fields

GB, HOUR = 1e9, 3600.0


@dataclass(frozen=True)
class Setup:
    """What is asked, and what the machines do."""

    trials: int = 512
    gpus: int = 64
    #: N, and the limits of k1 and k2, both drawn log-uniformly.
    neurons: float = 7e9
    k_low: float = 0.01
    k_high: float = 0.3
    #: Prompts, responses sampled for each, pairs made of each.
    prompts: int = 7500
    samples: int = 10
    pairs: int = 5
    prompt_tokens: int = 100
    response_tokens: int = 200
    #: Questions that each model is asked.
    questions: int = 1300
    #: bf16 FLOP/s that training and scoring reach on one GPU (assumed: 35 % of 989e12).
    flops: float = 3.5e14
    #: Tokens/s that an engine generates on one GPU with a full batch (assumed).
    generate: float = 2500.0
    #: Seconds until the first row or batch of a stage that starts workers (assumed).
    startup: float = 90.0
    #: Neurons/s that one process ranks, or sorts of a selection: 2.0 billion in 72 s, one core of an EPYC, both models
    #: and the ranks on a disk (`benchmarks.locate`).
    locate: float = 28e6
    #: Bytes/s that one node reads from and writes to the store (assumed), and GPUs a node.
    storage: float = 1e9
    gpus_per_node: int = 8
    gpu_memory: float = 80e9

    @property
    def k(self) -> float:
        """The mean share of the neurons."""
        return (self.k_high - self.k_low) / math.log(self.k_high / self.k_low)


def estimate(setup: Setup) -> dict[str, dict[str, float]]:
    """GPU-seconds by stage, hours, terabytes in the store, and gigabytes of a GPU."""
    n, pairs = setup.neurons, setup.prompts * setup.pairs
    both = pairs * (setup.prompt_tokens + 2 * setup.response_tokens)  # the prompt is computed once for both
    one = pairs * (setup.prompt_tokens + setup.response_tokens)

    def forward(tokens: float) -> float:
        return 2 * n * tokens / setup.flops

    def trained(tokens: float) -> float:
        return 8 * n * tokens / setup.flops

    answers = setup.questions * setup.response_tokens / setup.generate
    masters, delta, selection = 4 * n, 8 * setup.k * n, 4 * setup.k * n
    # Reading both models' masters tensor by tensor; one trial's share of its node's way to the store.
    share = setup.storage / setup.gpus_per_node
    # Measured importances have 4 bytes a neuron for themselves and 4 for their places; a k reads the places of its
    # own share, and about 10,000 importances of a million around its end.
    ranked, read = 8 * n, 4 * setup.k * n + 0.04 * n
    shared = {
        "samples": setup.prompts * setup.samples * setup.response_tokens / setup.generate,
        "reference": forward(both),
        "warm-up": trained(both),
        "importances": (2 * masters + ranked) / share + n / setup.locate,
        "reward model": trained(one),
        "token scores": forward(one),
        "evaluation of SFT and warm-up": 2 * answers,
    }
    trial = {
        "two selections: storage": 2 * (read + selection) / share,
        "two selections: sorting": 2 * setup.k * n / setup.locate,
        "forgetting": trained(one) + setup.startup + delta / share,
        "reference of the forgotten model": forward(both),
        "learning": trained(both) + setup.startup + delta / share,
        "evaluation": 2 * answers
        + setup.startup
        + 2 * 2 * 2 * n / share,  # bf16 weights written and read, two models
    }
    waves = math.ceil(setup.trials / setup.gpus)
    once, each = sum(shared.values()), sum(trial.values())
    return {
        "shared_gpu_seconds": shared,
        "trial_gpu_seconds": trial,
        "hours": {
            "shared": once / setup.gpus / HOUR,
            "trials": waves * each / HOUR,
            "gpu_hours": (once + setup.trials * each) / HOUR,
            "gpu_hours_independent": setup.trials * (once + each) / HOUR,
        },
        "store_terabytes": {
            "shared models": (2 * masters + 3 * 2 * n + masters) / 1e12,  # SFT, warm-up, reward
            "importances": ranked / 1e12,
            "selections": 2 * setup.trials * selection / 1e12,
            "deltas": 2 * setup.trials * delta / 1e12,
            "deltas as full bf16 models": 2 * setup.trials * 2 * n / 1e12,
            "largest trial, selections and deltas": 2 * 12 * setup.k_high * n / 1e12,
        },
        "gpu_gigabytes": {
            "trial, mean k": n * (2 + 20 * setup.k) / GB,
            "trial, largest k": n * (2 + 20 * setup.k_high) / GB,
            "warm-up, ZeRO 1 on a node": n * (2 + 4 + 16 / setup.gpus_per_node) / GB,
            "there": setup.gpu_memory / GB,
        },
    }


def table(found: dict[str, dict[str, float]]) -> str:
    """The figures as Markdown."""
    lines = ["| | | |", "|---|---|---|"]
    for group, told in found.items():
        lines += [
            f"| {group.replace('_', ' ')} | {name.replace('_', ' ')} | {value:,.3g} |"
            for name, value in told.items()
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for field in fields(Setup):
        kind = float if isinstance(field.default, float) else int
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    parser.add_argument("--json", help="also write the figures there")
    told = vars(parser.parse_args())
    target = told.pop("json")
    setup = Setup(**told)
    found = estimate(setup)
    if target:
        with open(target, "w", encoding="utf-8") as file:
            json.dump({"setup": asdict(setup), **found}, file, indent=1)
    print(table(found))


if __name__ == "__main__":
    main()
