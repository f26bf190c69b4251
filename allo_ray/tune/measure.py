"""What a trial is judged by: scores of its models on every suite, and their divergence from the SFT model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from allo_ray import tables
from allo_ray.config.tune import Campaign, ConstraintConfig, MeasureConfig
from allo_ray.errors import UserError
from allo_ray.method import LABELS
from allo_ray.pipeline import Node
from allo_ray.results import KL, compare
from allo_ray.stages.evaluate import MODEL_ROLE
from allo_ray.store import Artifact, local_path
from allo_ray.tune.records import Scores

#: The node that evaluates all models of a run.
EVALUATE = "evaluate"
#: The nodes whose models a trial is about.
FORGET, LEARN = "forget", "learn"


def scores_of(evaluate: Artifact) -> Scores:
    """Scores of each evaluated model by suite, and under "kl" how far it is from the SFT model."""
    answers = {
        label: tables.EVALS.read(local_path(evaluate.file(f"evals/{label}.parquet")))
        for label in evaluate.facts["models"]
    }
    scores: Scores = {label: {} for label in answers}
    for one in compare(answers, evaluate.facts["judged"])[0]:
        scores[one.label][one.suite] = {"accuracy": one.accuracy, "low": one.low, "high": one.high}
    for label, told in evaluate.facts.get(KL, {}).items():
        scores[label][KL] = {KL: told["mean"]}
    return scores


def value_of(measure: MeasureConfig, scores: Scores, label: str | None = None) -> float:
    """The measured quantity, of the model `label`, else of the one that `measure` names, else of the last one trained.

    Raises:
        UserError: it was not measured.
    """
    last = next((LABELS[node] for node in (LEARN, FORGET) if LABELS[node] in scores), "")
    label = label or measure.model or last
    found = scores.get(label, {}).get(measure.suite or KL, {}).get(measure.metric)
    if found is None or math.isnan(found):
        raise UserError(
            f"{measure.words} of {label} was not measured. Measured are: "
            f"{', '.join(f'{suite} of {name}' for name, suites in scores.items() for suite in suites)}."
        )
    return float(found)


def broke(constraints: Sequence[ConstraintConfig], scores: Scores) -> bool:
    """Whether the scores are beyond any bound."""
    return any(bound.excess(value_of(bound, scores)) > 0 for bound in constraints)


def check_measures(campaign: Campaign, nodes: Sequence[Node]) -> None:
    """Raises UserError where the objective or a constraint names what the base does not measure."""
    config, evaluate = campaign.config, campaign.base.evaluate
    titles = [suite.title for suite in evaluate.suites]
    labels = models_of({node.name: node for node in nodes}[EVALUATE])
    measures = {"objective": config.objective, "second": config.second}
    measures |= {f"constraints.{number}": bound for number, bound in enumerate(config.constraints)}
    for place, measure in measures.items():
        if measure is None:
            continue
        if measure.suite is not None and measure.suite not in titles:
            raise UserError(
                f"{place}: no suite is called '{measure.suite}'. The base {config.base} has: "
                f"{', '.join(titles) or 'none'} (evaluate.suites)."
            )
        if measure.model is not None and measure.model not in labels:
            raise UserError(f"{place}: no model is called '{measure.model}'. There are: {', '.join(labels)}.")
        if measure.suite is None and (not evaluate.kl_samples or campaign.base.data.kind != "prompts"):
            raise UserError(
                f"{place}: kl needs samples of the SFT model: data.kind prompts, and evaluate.kl_samples above 0."
            )


def models_of(evaluate: Node) -> dict[str, str]:
    """Label -> node of each model that an evaluation asks, in its order."""
    return {
        role.removeprefix(MODEL_ROLE): name
        for role, name in evaluate.inputs.items()
        if role.startswith(MODEL_ROLE)
    }


def restricted(evaluate: Node, there: Mapping[str, object]) -> Node | None:
    """The evaluation of those models alone whose nodes are `there`; None without any, or without another input."""
    inputs = {role: name for role, name in evaluate.inputs.items() if name in there}
    others = {role for role in evaluate.inputs if not role.startswith(MODEL_ROLE)}
    if not others <= inputs.keys() or others == inputs.keys():
        return None
    return Node(evaluate.name, evaluate.stage, evaluate.settings, inputs)
