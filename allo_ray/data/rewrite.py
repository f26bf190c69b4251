"""Minimal-edit rewrites of the sampled negatives (paper 4.2): asked of a teacher, verified, kept, resumable by id."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from allo_ray import tables
from allo_ray.config.data import VerifyConfig
from allo_ray.data.lookup import stream, write_stream
from allo_ray.data.reward_rows import context_of
from allo_ray.data.teachers import Case, Teacher
from allo_ray.data.tokenise import Tokeniser
from allo_ray.data.verify import Verifier
from allo_ray.errors import UserError


class Progress(Protocol):
    def update(self, done: int, total: int, unit: str, **facts: Any) -> None: ...


def rewrite_pairs(
    out: str | Path,
    *,
    pairs: str | Path,
    teacher: Teacher,
    verify: VerifyConfig,
    reward: Tokeniser,
    sampled_only: bool = True,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Writes REWRITES to the file `out`, one row for each pair whose negative the teacher corrected.

    A negative that stands in several pairs is asked for once. Answers go to `<out>.journal.jsonl` as they come; a run
    that starts again asks for what is missing there. A rewrite counts only if the verifier calls it right.

    Args:
        sampled_only: only sampled negatives (Algorithm 1), unless the table holds none.

    Returns:
        pairs, negatives (different ones), rewritten, no_rewrite (the teacher gave none), wrong (the verifier says),
        unchanged, rows.

    Raises:
        UserError: the teacher cannot be reached, or not one rewrite is right.
    """
    out = Path(out)
    verifier = Verifier(verify)
    journal = _Journal(out.with_name(f"{out.name}.journal.jsonl"))
    facts: Counter[str] = Counter(pairs=0, negatives=0, rewritten=0, no_rewrite=0, wrong=0, unchanged=0)
    sources = {row["rejected_source"] for row in stream(tables.PAIRS, pairs, ["rejected_source"])}
    wanted = {"sample"} if sampled_only and "sample" in sources else sources
    facts["negatives"] = len(set(_negatives(pairs, wanted)))

    def missing() -> Iterator[Case]:
        asked: set[str] = set(journal.done)
        for pair in _pairs(pairs, wanted):
            name = negative_id(pair)
            if name not in asked:
                asked.add(name)
                reference = pair["reference"] or pair["chosen"]
                gold = (
                    verifier.gold(pair["reference"])
                    if pair["reference"]
                    else verifier.extract(pair["chosen"])
                )
                yield Case(name, context_of(pair), pair["rejected"], reference, gold)

    with journal:
        for name, text in teacher.rewrite(missing()):
            journal.add(name, text)
            if progress is not None:
                progress.update(len(journal.done), facts["negatives"], "negatives")

    def rows() -> Iterator[dict[str, Any]]:
        counted: set[str] = set()
        for pair in _pairs(pairs, wanted):
            facts["pairs"] += 1
            name = negative_id(pair)
            outcome, text = _judge(pair, journal.done.get(name), verifier)
            if name not in counted:
                counted.add(name)
                facts[outcome] += 1
            if outcome == "rewritten":
                yield _row(pair, text, reward, teacher.name)

    facts["rows"] = write_stream(tables.REWRITES, rows(), out)
    if facts["rows"] == 0:
        raise UserError(
            f"the teacher {teacher.name} corrected none of {facts['negatives']} negatives ({facts['no_rewrite']} "
            f"without an answer, {facts['wrong']} judged wrong, {facts['unchanged']} unchanged). Check rewrite, verify."
        )
    journal.path.unlink()
    return dict(facts)


def negative_id(pair: dict[str, Any]) -> str:
    """Id of a negative: pairs that share prompt and rejected response share it."""
    return tables.content_id(pair["prompt_id"], pair["rejected"])


class _Journal:
    """Answers so far, one JSON line each. A line that a crash cut short is asked for again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: dict[str, str | None] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = 0
        if path.exists():
            with path.open("rb") as file:
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    told = json.loads(line)
                    self.done[told["id"]] = told["text"]
                    whole += len(line)
            with path.open("rb+") as file:
                file.truncate(whole)

    def add(self, name: str, text: str | None) -> None:
        self._file.write(json.dumps({"id": name, "text": text}, ensure_ascii=False) + "\n")
        self._file.flush()
        self.done[name] = text

    def __enter__(self) -> _Journal:
        self._file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _pairs(path: str | Path, wanted: set[str]) -> Iterator[dict[str, Any]]:
    return (pair for pair in stream(tables.PAIRS, path) if pair["rejected_source"] in wanted)


def _negatives(path: str | Path, wanted: set[str]) -> Iterator[str]:
    columns = ["prompt_id", "rejected", "rejected_source"]
    return (
        negative_id(row) for row in stream(tables.PAIRS, path, columns) if row["rejected_source"] in wanted
    )


def _judge(pair: dict[str, Any], answer: str | None, verifier: Verifier) -> tuple[str, str]:
    """(what became of it, the rewrite with the prediction's own leading blanks)."""
    if answer is None or not answer.strip():
        return "no_rewrite", ""
    prediction = pair["rejected"]
    text = prediction[: len(prediction) - len(prediction.lstrip())] + answer.strip()
    if text.strip() == prediction.strip():
        return "unchanged", ""
    gold = verifier.gold(pair["reference"]) if pair["reference"] else verifier.extract(pair["chosen"])
    _, right = verifier.check(pair["prompt"], text, gold)
    # Without a gold answer nothing can be verified; the teacher's word is all there is.
    return ("wrong", "") if right is False else ("rewritten", text)


def _row(pair: dict[str, Any], text: str, reward: Tokeniser, teacher: str) -> dict[str, Any]:
    context = context_of(pair)
    ids = reward.response(text)
    return {
        "id": pair["id"],
        "prediction": pair["rejected"],
        "rewrite": text,
        "rewrite_ids": ids,
        "context": context,
        "context_ids": reward.prompt(context),
        "edits": edit_distance(reward.response(pair["rejected"]), ids),
        "teacher": teacher,
    }


def edit_distance(left: list[int], right: list[int]) -> int:
    """Levenshtein distance: the fewest tokens inserted, deleted or replaced that turn one into the other."""
    row = np.arange(len(right) + 1)
    steps = np.arange(len(right) + 1)
    other = np.asarray(right)
    for place, token in enumerate(left, start=1):
        best = np.empty_like(row)
        best[0] = place
        best[1:] = np.minimum(row[1:] + 1, row[:-1] + (other != token))
        row = np.minimum.accumulate(best - steps) + steps  # insertions run along the row
    return int(row[-1])
