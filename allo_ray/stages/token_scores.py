"""P_re of Eq. 5: the reward model's probability of every token of every rejected response.

Its context is what it was trained with: the problem, the correct solution, and the prediction itself.
"""

from __future__ import annotations

from allo_ray.data.inference import score
from allo_ray.data.reward_rows import write_score_rows, write_token_scores
from allo_ray.data.tokenise import Tokeniser
from allo_ray.stages.base import Context, Stage
from allo_ray.store import local_path


def run(ctx: Context) -> None:
    """Writes token_scores.parquet on the policy's tokens; P_re, never r, so that u stays a look-up."""
    model, pairs = ctx.model("model").here.base, ctx.file("pairs", "pairs.parquet")
    reward = Tokeniser(model)
    policy = Tokeniser(str(local_path(ctx.model("policy").base)))
    rows = ctx.out / "score_rows.parquet"
    write_score_rows(rows, pairs=pairs, policy=policy, reward=reward)
    facts = score(
        rows,
        model,
        ctx.config.engine,
        str(ctx.out / "scores"),
        model_id=ctx.inputs["model"].key,
        progress=ctx.progress,
    )
    counts = write_token_scores(
        ctx.out / "token_scores.parquet", pairs=pairs, raw=ctx.out / "scores", policy=policy, reward=reward
    )
    ctx.startup_seconds = facts["startup_seconds"]
    ctx.facts.update(engine=facts, counts=counts)


TOKEN_SCORES = Stage("token_scores", 1, run)
