"""From verified samples to preference pairs: right x wrong, or a human response x a wrong or unverified one.

Every rule says in the returned facts how many rows it removed; pairs that are too long are listed in DROPS as well.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from allo_ray import tables
from allo_ray.config.data import DataConfig, PairConfig
from allo_ray.data.lookup import BATCH_ROWS, Lookup, stream, write_stream
from allo_ray.data.prepare import excerpt
from allo_ray.data.tokenise import Tokeniser
from allo_ray.errors import UserError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Side:
    """One candidate response; `index` is that of the sample, None for a human's."""

    text: str
    ids: tuple[int, ...]
    source: str
    index: int | None = None


class Pairing:
    """The rules, and the count of what each did. `drops` holds the pairs that were too long, as rows of DROPS."""

    def __init__(self, config: PairConfig, data: DataConfig, seed: int, tokeniser: Tokeniser) -> None:
        self.config, self.data, self.seed, self.tokeniser = config, data, seed, tokeniser
        self.facts: Counter[str] = Counter()
        self.drops: list[dict[str, Any]] = []

    def pairs(self, prompt: Row, samples: list[Row]) -> list[dict[str, Any]]:
        """The pairs of one prompt (PAIRS rows), at most `per_prompt`, the best ones by `choose` first.

        The outcome depends on the prompt's id, its samples and the seed alone.
        """
        facts = self.facts
        facts["prompts"] += 1
        facts["samples"] += len(samples)
        samples = sorted(samples, key=lambda sample: sample["index"])
        right, wrong = self._sides(samples)
        human = not right and self.data.reference_is_response and bool(prompt["reference"])
        if human:
            facts["prompts_with_human_positive"] += 1
            right = [Side(prompt["reference"], tuple(self.tokeniser.response(prompt["reference"])), "human")]
            wrong = [side for side in wrong if _bare(side.text) != _bare(prompt["reference"])]
        if not right:
            facts["prompts_without_right"] += 1
        if not wrong:
            facts["prompts_without_wrong"] += 1
        chosen = self._choose(prompt["id"], [(good, bad) for good in right for bad in wrong])
        rows = []
        for good, bad in chosen:
            length = len(prompt["prompt_ids"]) + max(len(good.ids), len(bad.ids))
            if length > self.data.max_tokens:
                facts["pairs_over_long"] += 1
                self.drops.append(self._drop(prompt["id"], good, bad, length))
            else:
                rows.append(_row(prompt, good, bad))
        facts["pairs"] += len(rows)
        return rows

    def _sides(self, samples: list[Row]) -> tuple[list[Side], list[Side]]:
        """(right, wrong or unverified) without empty ones and near-duplicates."""
        right: list[Side] = []
        wrong: list[Side] = []
        seen: set[str] = set()
        for sample in samples:
            verdict = sample["verdict"]
            self.facts["unverified" if verdict is None else "right" if verdict else "wrong"] += 1
            text = sample["text"]
            if not text.strip():
                self.facts["empty"] += 1
            elif verdict and sample["finish_reason"] == "length":
                self.facts["right_but_unfinished"] += 1  # as a positive it would teach not to stop
            elif verdict is None and not self.data.reference_is_response:
                self.facts["unverified_unused"] += 1
            elif (bare := _bare(text)) in seen:
                self.facts["near_duplicates"] += 1
            else:
                seen.add(bare)
                side = Side(text, tuple(sample["response_ids"]), "sample", sample["index"])
                (right if verdict else wrong).append(side)
        return right, wrong

    def _drop(self, prompt_id: str, good: Side, bad: Side, length: int) -> dict[str, Any]:
        field, side = ("chosen", good) if len(good.ids) >= len(bad.ids) else ("rejected", bad)
        return {
            "source": f"prompt {prompt_id}",
            "row": side.index,
            "field": field,
            "reason": f"{length} tokens with the prompt; data.max_tokens is {self.data.max_tokens}",
            "excerpt": excerpt(side.text),
        }

    def _choose(self, prompt_id: str, product: list[tuple[Side, Side]]) -> list[tuple[Side, Side]]:
        random.Random(f"pairs/{self.seed}/{prompt_id}").shuffle(product)
        if self.config.choose == "hardest":
            product.sort(
                key=lambda pair: -common_prefix(pair[0].ids, pair[1].ids)
            )  # stable: ties stay shuffled
        self.facts["pairs_possible"] += len(product)
        self.facts["pairs_over_per_prompt"] += max(0, len(product) - self.config.per_prompt)
        return product[: self.config.per_prompt]


def build_pairs(
    prompts: str | Path,
    samples: str | Path,
    out: str | Path,
    drops: str | Path,
    *,
    config: PairConfig,
    data: DataConfig,
    seed: int,
    tokeniser: Tokeniser,
) -> dict[str, int]:
    """Writes PAIRS to the file `out` from the tables PROMPTS and SAMPLES and returns the count of every rule.

    Pairs longer than `data.max_tokens` are listed in the file `drops` (DROPS): `source` names the prompt, `row` the
    index of the longer sample. Pairs stand in the order of their ids, so that neither shards nor restarts show in what
    is computed from them. The samples of one prompt stand together in their table. Memory holds the prompts' ids, the
    pairs' ids and a batch of samples.

    Raises:
        UserError: no pair is left, and which rule took most; or more than `config.max_dropped` of them are too long.
    """
    out = Path(out)
    unsorted = out.with_name(f".{out.name}.unsorted")
    with Lookup(tables.PROMPTS, prompts, out.parent) as known:
        cut = None
        if config.limit:
            cut = _cut(known, samples, Pairing(config, data, seed, tokeniser), config.limit)
        pairing = Pairing(config, data, seed, tokeniser)
        with pq.ParquetWriter(drops, tables.DROPS.schema, compression="zstd") as listed:
            rows = (
                row
                for group in _groups(known, samples, pairing, listed)
                for rank, row in enumerate(group)
                if cut is None or _place(seed, rank, row) <= cut
            )
            kept = write_stream(tables.PAIRS, rows, unsorted)
    with Lookup(tables.PAIRS, unsorted, out.parent) as pairs:
        write_stream(tables.PAIRS, pairs.in_order(), out)
    unsorted.unlink()
    facts = dict(pairing.facts)
    _stop_if_too_long(facts.get("pairs_over_long", 0), facts["pairs"], config, data, drops)
    facts["pairs_over_limit"] = facts["pairs"] - kept
    facts["pairs"] = kept
    if kept == 0:
        raise UserError(
            f"no preference pair could be made from {facts['prompts']} prompts: {_told(facts)}. If nothing was right, "
            "check `verify`, the template, or start from a better model; if all was, take harder prompts."
        )
    return facts


def _groups(
    known: Lookup, samples: str | Path, pairing: Pairing, listed: pq.ParquetWriter | None = None
) -> Iterator[list[dict[str, Any]]]:
    """Yields each prompt's pairs, in the order in which the samples stand; hands the drops on to `listed`."""
    for chunk in _chunks(samples):
        rows = known.find([group[0]["prompt_id"] for group in chunk])
        for prompt, group in zip(known.take(rows), chunk, strict=True):
            yield pairing.pairs(prompt, group)
        if listed is not None and pairing.drops:
            listed.write_table(tables.DROPS.build(pairing.drops))
        pairing.drops.clear()


def _stop_if_too_long(
    dropped: int, kept: int, config: PairConfig, data: DataConfig, drops: str | Path
) -> None:
    if dropped <= config.max_dropped * (dropped + kept):
        return
    first = tables.DROPS.read(drops).slice(0, 1).to_pylist()[0]
    raise UserError(
        f"{dropped} of {dropped + kept} sampled pairs are longer than data.max_tokens = {data.max_tokens}, more than "
        f"pair.max_dropped = {config.max_dropped:g} allows. The first: {first['source']}, field '{first['field']}': "
        f"{first['reason']}. All are listed in {drops}. Raise data.max_tokens or pair.max_dropped (no sample is drawn "
        "again for either), or lower sample.max_tokens."
    )


def _chunks(samples: str | Path) -> Iterator[list[list[Row]]]:
    """Yields lists of whole prompts' samples, of about a batch of rows each."""
    chunk: list[list[Row]] = []
    count = 0
    for row in stream(tables.SAMPLES, samples):
        if chunk and chunk[-1][0]["prompt_id"] == row["prompt_id"]:
            chunk[-1].append(row)
        else:
            if count >= BATCH_ROWS:
                yield chunk
                chunk, count = [], 0
            chunk.append([row])
        count += 1
    if chunk:
        yield chunk


def _cut(known: Lookup, samples: str | Path, pairing: Pairing, limit: int) -> tuple[int, str] | None:
    """The last place that `limit` leaves in: every prompt's first pair counts before any prompt's second."""
    groups = _groups(known, samples, pairing)
    places = sorted(_place(pairing.seed, rank, row) for group in groups for rank, row in enumerate(group))
    return places[limit - 1] if len(places) > limit else None


def _place(seed: int, rank: int, row: Row) -> tuple[int, str]:
    return rank, tables.content_id(seed, row["id"])


def _row(prompt: Row, good: Side, bad: Side) -> dict[str, Any]:
    return {
        "id": tables.content_id(prompt["id"], good.ids, bad.ids),
        "prompt_id": prompt["id"],
        "prompt": prompt["prompt"],
        "text": prompt["text"],
        "reference": prompt["reference"],
        "chosen": good.text,
        "rejected": bad.text,
        "prompt_ids": prompt["prompt_ids"],
        "chosen_ids": list(good.ids),
        "rejected_ids": list(bad.ids),
        "chosen_source": good.source,
        "rejected_source": bad.source,
    }


def common_prefix(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """How many tokens two responses share at their beginning."""
    return next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )


def _bare(text: str) -> str:
    """Responses that agree in this are near-duplicates: they differ in case, blanks and punctuation only."""
    return " ".join(re.sub(r"[,;:!?\"'`*]|\.(?!\d)", " ", text.casefold()).split())


def _told(facts: Mapping[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in sorted(facts.items()) if count)
