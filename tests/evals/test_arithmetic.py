"""The quickstart's task and its transfer task: sizes, splits, and that the test side is new to training."""

from __future__ import annotations

import re
from itertools import combinations

import pytest

from allo_ray.config.data import SuiteConfig, VerifyConfig
from allo_ray.data.verify import Verifier
from allo_ray.errors import UserError
from evals.suites.arithmetic import Arithmetic
from evals.suites.registry import build_suite, load_suite
from evals.suites.transfer import Transfer


def numbers_of(prompt: str) -> list[int]:
    return [int(found) for found in re.findall(r"\d+", prompt)]


def calculations(reference: str) -> set[frozenset[int]]:
    """Unordered number pairs of the steps written in a reference."""
    return {frozenset(map(int, found)) for found in re.findall(r"(-?\d+) [+-] (\d+) =", reference)}


@pytest.mark.parametrize(("steps", "limit"), [(2, 50), (2, 99), (3, 50), (3, 99)])
def test_no_number_pair_of_the_test_occurs_in_training(steps: int, limit: int) -> None:
    """In any order and any place, and no calculation of the working either."""
    suite = Arithmetic(steps=steps, limit=limit)
    sides = {name: list(suite.rows(name)) for name in ("train", "sft", "test")}
    assert [len(rows) for rows in sides.values()] == [400, 300, 300]
    prompts = [row["prompt"] for rows in sides.values() for row in rows]
    assert len(set(prompts)) == len(prompts)

    def pairs(*names: str) -> set[frozenset[int]]:
        every = [row for name in names for row in sides[name]]
        own = {frozenset(pair) for row in every for pair in combinations(numbers_of(row["prompt"]), 2)}
        return own.union(*(calculations(row["reference"] or "") for row in every))

    assert not pairs("test") & pairs("train", "sft")


@pytest.mark.parametrize("steps", [2, 3])
def test_references_are_right(steps: int) -> None:
    verifier = Verifier(VerifyConfig(kind="numeric"))
    for row in Arithmetic(steps=steps, limit=60).rows("test"):
        assert eval(row["prompt"]) == int(row["answer"] or "")
        assert verifier.check(row["prompt"], row["reference"] or "", row["answer"])[1]
        for step in re.findall(r"(-?\d+ [+-] \d+) = (-?\d+)", row["reference"] or ""):
            assert eval(step[0]) == int(step[1])


def test_forms() -> None:
    def first(**changes) -> str | None:
        return next(iter(Arithmetic(steps=3, **changes).rows("test")))["reference"]

    assert re.fullmatch(r" \d+ [+-] \d+ = (\d+), \1 [+-] \d+ = (\d+)\. The answer is \2", first() or "")
    assert re.fullmatch(r" The answer is \d+", first(form="answer") or "")
    assert re.fullmatch(r" \d+", first(form="bare") or "")


def test_natural_results_stay_at_0_or_above() -> None:
    every = list(Arithmetic(steps=3, limit=40, train=1000).rows("train"))
    assert min(int(found) for row in every for found in re.findall(r"= (-?\d+)", row["reference"] or "")) >= 0
    some = Arithmetic(results="integer", limit=40).rows("train")
    assert any(int(row["answer"] or "0") < 0 for row in some)


@pytest.mark.parametrize("seed", range(6))
def test_the_test_side_has_its_share_whatever_the_seed(seed: int) -> None:
    """Of 465 pairs up to 30, 139 or 140 are the test's; a pair of different numbers makes a sum in two orders and a
    difference, a pair of equal ones two questions: 420 less some 9."""
    assert len(list(Arithmetic(limit=30, test=400, seed=seed).rows("test"))) == 400


def test_seed_decides_and_more_rows_change_none() -> None:
    rows = list(Arithmetic().rows("train"))
    assert list(Arithmetic().rows("train")) == rows
    assert list(Arithmetic(train=450).rows("train"))[:400] == rows
    assert list(Arithmetic(sft=10).rows("train")) == rows
    assert list(Arithmetic(seed=18).rows("train")) != rows


def test_a_small_range_gives_all_it_has_and_no_more() -> None:
    """Numbers 1 to 4, sums and differences that stay natural: 16 + 10 questions on both sides together."""
    sizes = {"limit": 4, "test_share": 0.5}
    with pytest.raises(UserError, match=r"only (\d+) different test questions") as caught:
        list(Arithmetic(**sizes, test=100).rows("test"))
    test = int(re.findall(r"only (\d+)", str(caught.value))[0])
    with pytest.raises(UserError, match=r"only (\d+) different train questions") as caught:
        list(Arithmetic(**sizes, train=100).rows("train"))
    assert test + int(re.findall(r"only (\d+)", str(caught.value))[0]) == 26


@pytest.mark.parametrize(
    "changes", [{"steps": 4}, {"form": "long"}, {"results": "any"}, {"test_share": 0}, {"lowest": 99}]
)
def test_wrong_arguments_are_the_users_errors(changes: dict) -> None:
    with pytest.raises(UserError, match=next(iter(changes))):
        Arithmetic(**changes)
    with pytest.raises(UserError, match="no split 'dev'"):
        list(Arithmetic().rows("dev"))


def test_transfer_products_and_comparison() -> None:
    products = list(Transfer().rows("test"))
    assert len({row["prompt"] for row in products}) == 64
    for row in products:
        assert eval(row["prompt"]) == int(row["answer"] or "")
    for row in Transfer(kind="comparison", count=90, lowest=1, limit=10).rows("test"):
        left, right = numbers_of(row["prompt"])
        assert left != right
        assert max(left, right) == int(row["answer"] or "")
    with pytest.raises(UserError, match="only 64 questions"):
        list(Transfer(count=65).rows("test"))


def test_registry() -> None:
    suite = load_suite(SuiteConfig(name="arithmetic", args={"limit": 20, "test": 5}))
    assert len(list(suite.rows("test"))) == 5
    for name, args, path, what in (
        ("sums", {}, None, "is not known; there are .*arithmetic"),
        ("arithmetic", {"limits": 3}, None, "unknown argument 'limits'"),
        ("gsm8k", {}, None, "needs `path`"),
        ("arithmetic", {}, "x.jsonl", "unknown argument 'path'"),
    ):
        with pytest.raises(UserError, match=what):
            build_suite(name, path, args)
