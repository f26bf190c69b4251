"""Pairing: which responses are set against each other, and what each rule counts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from allo_ray import tables
from allo_ray.config.data import DataConfig, PairConfig
from allo_ray.data.pairing import Pairing, build_pairs, common_prefix
from allo_ray.data.tokenise import Tokeniser
from allo_ray.errors import UserError


def prompt(name: str = "p", reference: str | None = " 1 + 1 = 2. The answer is 2") -> dict[str, Any]:
    return {
        "id": name,
        "prompt": "1 + 1",
        "text": "Question: 1 + 1\nAnswer:",
        "prompt_ids": [5, 6, 7],
        "reference": reference,
        "answer": "2",
        "group": None,
    }


def samples(
    tokeniser: Tokeniser, told: Sequence[tuple[str, bool | None]], name: str = "p"
) -> list[dict[str, Any]]:
    return [
        {
            "id": f"{name}{index}",
            "prompt_id": name,
            "index": index,
            "seed": index,
            "text": text,
            "response_ids": tokeniser.response(text),
            "finish_reason": "stop",
            "answer": None,
            "verdict": verdict,
        }
        for index, (text, verdict) in enumerate(told)
    ]


def pairing(tokeniser: Tokeniser, data: dict[str, Any] | None = None, **config: Any) -> Pairing:
    return Pairing(PairConfig(**config), DataConfig(path="x", **(data or {})), 3, tokeniser)


def texts(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return sorted((row["chosen"], row["rejected"]) for row in rows)


def test_right_times_wrong(tokeniser: Tokeniser) -> None:
    rules = pairing(tokeniser)
    rows = rules.pairs(prompt(), samples(tokeniser, [("2", True), ("3", False), ("two", True), ("4", False)]))
    assert texts(rows) == [("2", "3"), ("2", "4"), ("two", "3"), ("two", "4")]
    assert {(row["chosen_source"], row["rejected_source"]) for row in rows} == {("sample", "sample")}
    assert rules.facts["pairs"] == 4
    assert len({row["id"] for row in rows}) == 4


def test_at_most_per_prompt_and_the_seed_decides_which(tokeniser: Tokeniser) -> None:
    told = samples(tokeniser, [("2", True), ("3", False), ("two", True), ("4", False)])
    first = pairing(tokeniser, per_prompt=2)
    rows = first.pairs(prompt(), told)
    assert len(rows) == 2
    assert first.facts["pairs_possible"] == 4
    assert first.facts["pairs_over_per_prompt"] == 2
    assert (
        pairing(tokeniser, per_prompt=2).pairs(prompt(), told[::-1]) == rows
    )  # whatever the order of the samples
    others = [
        Pairing(PairConfig(per_prompt=2), DataConfig(path="x"), seed, tokeniser).pairs(prompt(), told)
        for seed in range(8)
    ]
    assert any(texts(other) != texts(rows) for other in others)


def test_hardest_pairs_share_the_longest_beginning(tokeniser: Tokeniser) -> None:
    told = [
        ("1 + 1 = 2. The answer is 2", True),
        ("5", False),
        ("1 + 1 = 3. The answer is 3", False),
        ("1 + 2", False),
    ]
    rows = pairing(tokeniser, choose="hardest", per_prompt=2).pairs(prompt(), samples(tokeniser, told))
    assert [row["rejected"] for row in rows] == ["1 + 1 = 3. The answer is 3", "1 + 2"]


def test_near_duplicates_empty_and_unfinished_are_left_out(tokeniser: Tokeniser) -> None:
    rules = pairing(tokeniser)
    told = samples(
        tokeniser,
        [("It is 2.", True), ("it is  2", True), ("3", False), ("", False), ("3!", False), ("2 2 2", True)],
    )
    told[-1]["finish_reason"] = "length"
    assert texts(rules.pairs(prompt(), told)) == [("It is 2.", "3")]
    assert {name: rules.facts[name] for name in ("near_duplicates", "empty", "right_but_unfinished")} == {
        "near_duplicates": 2,
        "empty": 1,
        "right_but_unfinished": 1,
    }


def test_numbers_and_signs_make_no_near_duplicates(tokeniser: Tokeniser) -> None:
    told = [("2", True), ("1.5", False), ("15", False), ("-15", False)]
    assert len(pairing(tokeniser).pairs(prompt(), samples(tokeniser, told))) == 3


def test_human_positive_where_no_sample_is_right(tokeniser: Tokeniser) -> None:
    """Paper 4.1: with only a human positive, it is y+ and the model's own response y-."""
    told = samples(tokeniser, [("3", False), ("4", False)])
    data = {"reference_is_response": True}
    rules = pairing(tokeniser, data)
    rows = rules.pairs(prompt(), told)
    assert {row["chosen_source"] for row in rows} == {"human"}
    assert rows[0]["chosen_ids"] == tokeniser.response(" 1 + 1 = 2. The answer is 2")
    assert rules.facts["prompts_with_human_positive"] == 1
    assert pairing(tokeniser).pairs(prompt(), told) == []
    right = [*told, *samples(tokeniser, [("2", True)])]
    assert {row["chosen_source"] for row in pairing(tokeniser, data).pairs(prompt(), right)} == {"sample"}


def test_unverified_samples_are_negatives_to_a_human_positive_only(tokeniser: Tokeniser) -> None:
    told = samples(tokeniser, [("a reply", None), (" 1 + 1 = 2. The answer is 2", None)])
    rows = pairing(tokeniser, {"reference_is_response": True}).pairs(prompt(), told)
    assert [row["rejected"] for row in rows] == ["a reply"]  # the reference itself is no negative
    assert pairing(tokeniser).pairs(prompt(), told) == []


def test_over_long_pairs_are_counted(tokeniser: Tokeniser) -> None:
    rules = pairing(tokeniser, {"max_tokens": 5})
    assert rules.pairs(prompt(), samples(tokeniser, [("2", True), ("3 3 3 3", False)])) == []
    assert rules.facts["pairs_over_long"] == 1


@pytest.mark.parametrize(("limit", "allowed"), [(0.5, True), (0.49, False)])
def test_over_long_pairs_are_listed_and_too_many_stop_the_run(
    tmp_path: Path, tokeniser: Tokeniser, limit: float, allowed: bool
) -> None:
    """Two prompts, each with one wrong sample; that of the second is too long, so half of the pairs are."""
    tables.PROMPTS.write([prompt("a"), prompt("b")], tmp_path / "prompts.parquet")
    rows = [
        row
        for name, wrong in (("a", "3"), ("b", "3 " * 9))
        for row in samples(tokeniser, [("2", True), (wrong, False)], name)
    ]
    tables.SAMPLES.write(rows, tmp_path / "samples" / "0.parquet")
    longest = len(rows[3]["response_ids"]) + 3

    def build() -> dict[str, int]:
        return build_pairs(
            tmp_path / "prompts.parquet",
            tmp_path / "samples",
            tmp_path / "pairs.parquet",
            tmp_path / "drops.parquet",
            config=PairConfig(max_dropped=limit),
            data=DataConfig(path="x", max_tokens=longest - 1),
            seed=1,
            tokeniser=tokeniser,
        )

    if allowed:
        facts = build()
        assert (facts["pairs"], facts["pairs_over_long"]) == (1, 1)
        assert [row["prompt_id"] for row in tables.PAIRS.read(tmp_path / "pairs.parquet").to_pylist()] == [
            "a"
        ]
    else:
        with pytest.raises(
            UserError, match=r"1 of 2 sampled pairs .* pair.max_dropped = 0.49 .* prompt b, field"
        ):
            build()
    assert tables.DROPS.read(tmp_path / "drops.parquet").to_pylist() == [
        {
            "source": "prompt b",
            "row": 1,
            "field": "rejected",
            "reason": f"{longest} tokens with the prompt; data.max_tokens is {longest - 1}",
            "excerpt": "3 3 3 3 3 3 3 3 3",
        }
    ]


def test_common_prefix() -> None:
    assert common_prefix((1, 2, 3), (1, 2, 4)) == 2
    assert common_prefix((1, 2), (1, 2, 4)) == 2
    assert common_prefix((), (1,)) == 0


def _built(tmp_path: Path, tokeniser: Tokeniser, cut: list[slice], **config: Any) -> tuple[dict, list[dict]]:
    """Pairs of three prompts whose samples lie in shards cut as told."""
    names = ["a", "b", "c"]
    folder = tmp_path / f"s{len(cut)}"
    tables.PROMPTS.write([prompt(name) for name in names], tmp_path / "prompts.parquet")
    every = [
        row
        for name in names
        for row in samples(tokeniser, [("2", True), (f"3{name}", False), (f"4{name}", False)], name)
    ]
    for number, part in enumerate(cut):
        tables.SAMPLES.write(every[part], folder / f"{number}.parquet")
    out = tmp_path / f"pairs{len(cut)}.parquet"
    facts = build_pairs(
        tmp_path / "prompts.parquet",
        folder,
        out,
        tmp_path / "drops.parquet",
        config=PairConfig(**config),
        data=DataConfig(path="x"),
        seed=1,
        tokeniser=tokeniser,
    )
    return facts, tables.PAIRS.read(out).to_pylist()


def test_build_pairs_does_not_depend_on_the_shards(tmp_path: Path, tokeniser: Tokeniser) -> None:
    facts, rows = _built(tmp_path, tokeniser, [slice(0, 9)])
    other, again = _built(tmp_path, tokeniser, [slice(6, 9), slice(0, 6)])
    assert facts == other
    assert facts["pairs"] == len(rows) == 6
    assert rows == again == sorted(rows, key=lambda row: row["id"])
    assert not list(tmp_path.glob("**/*.arrow"))


def test_limit_gives_every_prompt_its_first_pair_before_any_its_second(
    tmp_path: Path, tokeniser: Tokeniser
) -> None:
    facts, rows = _built(tmp_path, tokeniser, [slice(0, 9)], limit=4)
    assert facts["pairs"] == 4
    assert facts["pairs_over_limit"] == 2
    assert {row["prompt_id"] for row in rows} == {"a", "b", "c"}


def test_no_pair_at_all_is_the_users_error(tmp_path: Path, tokeniser: Tokeniser) -> None:
    tables.PROMPTS.write([prompt()], tmp_path / "prompts.parquet")
    tables.SAMPLES.write(samples(tokeniser, [("2", True)]), tmp_path / "samples" / "0.parquet")
    with pytest.raises(UserError, match="prompts without wrong 1"):
        build_pairs(
            tmp_path / "prompts.parquet",
            tmp_path / "samples",
            tmp_path / "pairs.parquet",
            tmp_path / "drops.parquet",
            config=PairConfig(),
            data=DataConfig(path="x"),
            seed=1,
            tokeniser=tokeniser,
        )
