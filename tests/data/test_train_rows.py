"""The rows that training reads: their order, what is joined to them, and the weights of Eq. 5."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from allo_ray import tables
from allo_ray.data.tokenise import Tokeniser
from allo_ray.data.train_rows import build_sequence_rows, build_train_rows
from allo_ray.errors import UserError

PAIRS = 40


@pytest.fixture
def made(tmp_path: Path, make_pair: Callable[..., Any], logprobs_of: Callable[..., Any]) -> dict[str, Any]:
    """PAIRS, LOGPROBS and TOKEN_SCORES, the latter two in another order than the first."""
    pairs = [make_pair(number) for number in range(PAIRS)]
    draw = np.random.default_rng(0)
    scores = [
        {"id": pair["id"], "p_re": draw.random(len(pair["rejected_ids"])).astype(np.float32)}
        for pair in pairs
    ]
    tables.PAIRS.write(pairs, tmp_path / "pairs.parquet")
    tables.LOGPROBS.write([logprobs_of(pair) for pair in pairs[::-1]], tmp_path / "logprobs" / "0.parquet")
    tables.TOKEN_SCORES.write(scores[1::2], tmp_path / "scores" / "0.parquet")
    tables.TOKEN_SCORES.write(scores[::2], tmp_path / "scores" / "1.parquet")
    return {
        "pairs": {pair["id"]: pair for pair in pairs},
        "scores": {row["id"]: row["p_re"] for row in scores},
        "tables": {"pairs": tmp_path / "pairs.parquet", "logprobs": tmp_path / "logprobs"},
        "score_table": tmp_path / "scores",
    }


def build(made: dict[str, Any], out: Path, **changes: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    facts = build_train_rows(out, **(made["tables"] | {"epochs": 1, "seed": 5} | changes))
    return facts, tables.TRAIN_ROWS.read(out).to_pylist()


def test_every_pair_once_an_epoch_with_its_own_log_probs(made: dict[str, Any], tmp_path: Path) -> None:
    facts, rows = build(made, tmp_path / "rows.parquet", epochs=2)
    assert facts["rows"] == 2 * PAIRS
    assert [row["position"] for row in rows] == list(range(2 * PAIRS))
    first, second = [row["id"] for row in rows[:PAIRS]], [row["id"] for row in rows[PAIRS:]]
    assert sorted(first) == sorted(second) == sorted(made["pairs"])
    assert first != second
    for row in rows:
        pair = made["pairs"][row["id"]]
        assert row["rejected_ids"] == pair["rejected_ids"]
        assert row["rejected_weight"] == []
        assert row["rejected_reference"][0] == -int(row["id"], 16)
        assert len(row["chosen_reference"]) == len(row["chosen_ids"])
    assert not list(tmp_path.glob(".*"))


def test_order_depends_on_seed_and_epoch_not_on_files(made: dict[str, Any], tmp_path: Path) -> None:
    _, rows = build(made, tmp_path / "a.parquet")
    table = tables.PAIRS.read(made["tables"]["pairs"])
    tables.PAIRS.write(table.slice(25), tmp_path / "cut" / "0.parquet")
    tables.PAIRS.write(table.slice(0, 25), tmp_path / "cut" / "1.parquet")
    _, again = build(made, tmp_path / "b.parquet", pairs=tmp_path / "cut")
    assert again == rows
    _, other = build(made, tmp_path / "c.parquet", seed=6)
    assert [row["id"] for row in other] != [row["id"] for row in rows]
    _, longer = build(made, tmp_path / "d.parquet", epochs=3)
    assert longer[:PAIRS] == rows  # more epochs do not change the first


def test_threshold_is_equation_5(made: dict[str, Any], tmp_path: Path) -> None:
    """r_j = 1 where P_re < u, strictly: a token whose P_re equals u in float32 is kept out."""
    one = next(iter(made["scores"]))
    u = float(np.float64(made["scores"][one][0]))
    facts, rows = build(made, tmp_path / "rows.parquet", scores=made["score_table"], weight="threshold", u=u)
    expected = 0
    for row in rows:
        told = made["scores"][row["id"]] < np.float32(u)
        assert row["rejected_weight"] == told.astype(float).tolist()
        expected += int(told.sum())
    assert next(row for row in rows if row["id"] == one)["rejected_weight"][0] == 0
    assert facts["weighted_tokens"] == expected
    assert facts["kept"] == expected / facts["rejected_tokens"]


def test_soft_weights_are_p_re_itself(made: dict[str, Any], tmp_path: Path) -> None:
    _, rows = build(made, tmp_path / "rows.parquet", scores=made["score_table"], weight="soft")
    for row in rows:
        assert row["rejected_weight"] == made["scores"][row["id"]].tolist()


def test_blame_is_what_p_re_leaves_to_1(made: dict[str, Any], tmp_path: Path) -> None:
    _, rows = build(made, tmp_path / "rows.parquet", scores=made["score_table"], weight="blame")
    for row in rows:
        assert row["rejected_weight"] == (1 - made["scores"][row["id"]]).tolist()


def test_u_1_keeps_all_and_u_0_is_the_users_error(made: dict[str, Any], tmp_path: Path) -> None:
    told = {"scores": made["score_table"], "weight": "threshold"}
    facts, _ = build(made, tmp_path / "rows.parquet", u=1.0, **told)
    assert facts["kept"] == 1
    with pytest.raises(UserError, match=r"forget\.u"):
        build(made, tmp_path / "none.parquet", u=0.0, **told)
    assert not (tmp_path / "none.parquet").exists()


def test_pairs_without_a_score_are_counted(made: dict[str, Any], tmp_path: Path) -> None:
    (made["score_table"] / "1.parquet").unlink()
    facts, rows = build(
        made, tmp_path / "rows.parquet", scores=made["score_table"], weight="threshold", u=0.9, epochs=2
    )
    assert facts["unscored"] == PAIRS // 2
    assert [row["position"] for row in rows] == list(range(PAIRS))


def test_another_length_stops_the_run(made: dict[str, Any], tmp_path: Path) -> None:
    table = tables.LOGPROBS.read(made["tables"]["logprobs"]).to_pylist()
    table[3]["rejected"] = table[3]["rejected"][:-1]
    tables.LOGPROBS.write(table, tmp_path / "short.parquet")
    with pytest.raises(AssertionError, match="reference log-probs"):
        build(made, tmp_path / "rows.parquet", logprobs=tmp_path / "short.parquet")


def test_a_missing_log_prob_stops_the_run(made: dict[str, Any], tmp_path: Path) -> None:
    table = tables.LOGPROBS.read(made["tables"]["logprobs"])
    tables.LOGPROBS.write(table.slice(1), tmp_path / "short.parquet")
    with pytest.raises(AssertionError, match="every id must be found"):
        build(made, tmp_path / "rows.parquet", logprobs=tmp_path / "short.parquet")


def test_sequences_train_the_chosen_side(tokeniser: Tokeniser, tmp_path: Path) -> None:
    rows = [
        {"id": f"s{i}", "prompt_ids": tokeniser.prompt(f"{i}?"), "response_ids": tokeniser.response(f" {i}")}
        for i in range(7)
    ]
    tables.SEQUENCES.write(rows, tmp_path / "sequences.parquet")
    out = tmp_path / "rows.parquet"
    facts = build_sequence_rows(out, sequences=tmp_path / "sequences.parquet", epochs=2, seed=1)
    assert facts == {
        "rows": 14,
        "sequences": 7,
        "epochs": 2,
        "response_tokens": sum(len(row["response_ids"]) for row in rows),
    }
    built = tables.TRAIN_ROWS.read(out).to_pylist()
    assert [row["position"] for row in built] == list(range(14))
    by_id = {row["id"]: row for row in rows}
    for row in built:
        assert row["chosen_ids"] == by_id[row["id"]]["response_ids"]
        assert row["rejected_ids"] == row["rejected_weight"] == row["chosen_reference"] == []
