"""The user's files: what is read from each format, and the one error for each thing that can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from allo_ray.config.data import DataConfig
from allo_ray.data.sources import check_source, examples, fingerprint
from allo_ray.errors import UserError

PROMPTS = [{"prompt": f"{i} + 1", "reference": f"The answer is {i + 1}"} for i in range(5)]
PAIR = {"prompt": "1 + 1", "chosen": "2", "rejected": "3"}


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def config(path: Any, **changes: Any) -> DataConfig:
    return DataConfig(path=str(path), **changes)


def refused(path: Any, *parts: str, **changes: Any) -> bool:
    """Whether a source is refused in one line that says all this."""
    with pytest.raises(UserError) as caught:
        check_source(config(path, **changes))
    said = str(caught.value)
    print(said)  # shown where it does not
    return "\n" not in said and all(part in said for part in parts)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "datasets", "json", "folder", "pattern"])
def test_every_format_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    path: Any = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        write_lines(path, PROMPTS)
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(PROMPTS), path, row_group_size=2)
    elif kind == "json":
        path.write_text(json.dumps(PROMPTS))
    elif kind == "datasets":
        import datasets

        path = tmp_path / "saved"
        datasets.Dataset.from_list(PROMPTS).save_to_disk(path)
    else:
        folder = tmp_path / "folder"
        folder.mkdir()
        write_lines(folder / "a.jsonl", PROMPTS[:2])
        write_lines(folder / "b.jsonl", PROMPTS[2:])
        path = folder if kind == "folder" else f"{folder}/*.jsonl"
    found = list(examples(config(path)))
    assert [(one.prompt, one.reference) for one in found] == [
        (row["prompt"], row["reference"]) for row in PROMPTS
    ]
    assert check_source(config(path)) == 5
    assert check_source(config(path, limit=2)) == 2


def test_any_file_system_that_fsspec_opens(tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/rows.jsonl", "".join(json.dumps(row) + "\n" for row in PROMPTS).encode())
    assert check_source(config("memory://bucket/rows.jsonl")) == 5
    assert check_source(config("memory://bucket")) == 5
    assert check_source(config(f"file://{write_lines(tmp_path / 'rows.jsonl', PROMPTS)}")) == 5


def test_a_split_of_a_dataset_dict(tmp_path: Path) -> None:
    import datasets

    both = {name: datasets.Dataset.from_list(PROMPTS[:count]) for name, count in (("train", 3), ("test", 2))}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "saved")
    assert check_source(config(tmp_path / "saved", split="test")) == 2
    assert refused(tmp_path / "saved", "no split 'dev'", "train, test", split="dev")


def test_columns_are_mapped(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [{"q": "1 + 1", "solution": "so 2", "final": 2}])
    columns = {"prompt": "q", "reference": "solution", "answer": "final"}
    [found] = examples(config(path, columns=columns))
    assert (found.prompt, found.reference, found.answer) == ("1 + 1", "so 2", "2")


USER, BOT = {"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}
BAD = {"role": "assistant", "content": "3"}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (PAIR, "1 + 1"),
        ({"prompt": [USER], "chosen": [BOT], "rejected": [BAD]}, "1 + 1"),
        ({"chosen": [USER, BOT], "rejected": [USER, BAD]}, "1 + 1"),
        ({"prompt": "1 + 1", "chosen": [USER, BOT], "rejected": [USER, BAD]}, "1 + 1"),
        ({"prompt": [USER], "chosen": "2", "rejected": "3"}, "1 + 1"),
        (
            {"prompt": [{"role": "system", "content": "s"}, USER], "chosen": [BOT], "rejected": [BAD]},
            [{"role": "system", "content": "s"}, USER],
        ),
    ],
)
def test_plain_and_conversational_pairs(tmp_path: Path, row: dict, prompt: Any) -> None:
    path = write_lines(tmp_path / "x.jsonl", [row])
    [found] = examples(config(path, kind="pairs"))
    assert (found.prompt, found.chosen, found.rejected) == (prompt, "2", "3")


def test_broken_json_names_the_line(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [PROMPTS[0], "", '{"prompt": "a", ', PROMPTS[1]])
    assert refused(path, "x.jsonl, line 3", "broken JSON", "column")
    assert refused(write_lines(tmp_path / "y.jsonl", ["[1, 2]"]), "y.jsonl, line 1", "found list")


@pytest.mark.parametrize(
    ("row", "field", "what"),
    [
        ({"chosen": "2", "rejected": "3"}, "'prompt'", "is no column here (found 'chosen', 'rejected')"),
        (PAIR | {"chosen": "  "}, "'chosen'", "is empty"),
        (PAIR | {"rejected": None}, "'rejected'", "is empty"),
        (PAIR | {"prompt": ""}, "'prompt'", "is empty"),
        (PAIR | {"rejected": " 2"}, "'rejected'", "equals the chosen"),
        (PAIR | {"chosen": [USER]}, "'chosen'", "ends with the role 'user'"),
        (PAIR | {"chosen": [{"role": "assistant"}]}, "'chosen'", "without the texts"),
        (PAIR | {"chosen": 7}, "'chosen'", "holds int"),
        (PAIR | {"prompt": []}, "'prompt'", "an empty list"),
        ({"chosen": [USER, BOT], "rejected": [BAD]}, "'rejected'", "same conversation"),
    ],
)
def test_a_wrong_pair_names_line_and_field(tmp_path: Path, row: dict, field: str, what: str) -> None:
    assert refused(
        write_lines(tmp_path / "x.jsonl", [PAIR, row]), "x.jsonl, line 2", field, what, kind="pairs"
    )


def test_a_prompt_needs_something_to_verify_with(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [PROMPTS[0], {"prompt": "a"}])
    assert refused(path, "line 2", "'reference'", "to verify its samples")
    assert check_source(config(path), needs_reference=False) == 2


def test_what_is_not_there_or_cannot_be_read(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.jsonl", "none.jsonl", "no such file")
    assert refused(f"{tmp_path}/*.jsonl", "no file matches")
    assert refused(tmp_path, "holds no JSON, CSV or Parquet file")
    assert refused("warp://bucket/x.jsonl", "cannot be opened")
    (tmp_path / "x.parquet").write_bytes(b"not parquet at all")
    assert refused(tmp_path / "x.parquet", "x.parquet", "cannot be read")
    (tmp_path / "x.jsonl").write_bytes('{"prompt": "caf\xe9", "reference": "a"}\n'.encode("latin-1"))
    assert refused(tmp_path / "x.jsonl", "line 1", "UTF-8")
    (tmp_path / "x.txt").write_text("a")
    assert refused(tmp_path / "x.txt", "set `format`")
    (tmp_path / "empty.jsonl").write_text("\n")
    assert refused(tmp_path / "empty.jsonl", "holds no rows")
    assert refused(tmp_path, "no `datasets` folder", format="datasets")


def test_a_name_of_no_file_is_looked_up_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network the error says where was looked, and the hub's loader gets name, subset and split."""
    import datasets

    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, subset: datasets.DatasetDict(test=datasets.Dataset.from_list(PROMPTS)),
    )
    assert check_source(config("someone/sums", split="test")) == 5
    assert check_source(config("someone/sums:easy", split="test", format="hub")) == 5

    def offline(name: str, subset: str | None) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    assert refused("someone/sums", "someone/sums", "no network", "Check the path")


def test_a_suite_is_a_source() -> None:
    args = {"train": 30}
    found = list(examples(config("suite:arithmetic", args=args, limit=10)))
    assert len(found) == 10
    assert found[0].answer is not None
    assert refused("suite:arithmetic", "unknown argument 'traim'", args={"traim": 3})
    assert refused("suite:sums", "'sums' is not known")
    assert refused("suite:arithmetic", "set data.kind to prompts", kind="pairs")


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", PROMPTS)
    first = fingerprint(config(path))
    assert fingerprint(config(path)) == first
    (tmp_path / "sub").mkdir()
    assert fingerprint(config(write_lines(tmp_path / "sub" / "x.jsonl", PROMPTS))) == first
    write_lines(path, PROMPTS[::-1])
    assert fingerprint(config(path)) != first


def test_fingerprint_of_a_suite_is_that_of_its_questions() -> None:
    def told(**args: Any) -> str:
        return fingerprint(config("suite:arithmetic", args={"train": 20, **args}))

    assert told() == told(test=40)
    assert len({told(), told(limit=30), told(train=21), told(seed=3)}) == 4
