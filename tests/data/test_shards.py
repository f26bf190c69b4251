"""The folder of a batch job: atomic shards, what is done, whose it is."""

from __future__ import annotations

from pathlib import Path

import fsspec
import numpy as np
import pytest

from allo_ray import tables
from allo_ray.data.shard_index import Answered, hash_ids
from allo_ray.data.shards import Rejected, Shards, Superseded, name_of
from allo_ray.errors import UserError


def folder(path: Path | str) -> Shards:
    return Shards(str(path), tables.TOKEN_SCORES, "id")


def rows(*ids: str) -> list[dict]:
    return [{"id": one, "p_re": [0.5, 0.25]} for one in ids]


@pytest.mark.parametrize("where", ["local", "memory"])
def test_results_come_back_in_order_and_once(where: str, tmp_path: Path) -> None:
    """Two batches, one of them published twice over in other cuts, on a local folder and on an object store."""
    shards = folder(tmp_path if where == "local" else f"memory://{tmp_path.name}")
    shards.claim({"a": 1})
    shards.publish(name_of(["c", "d"]), rows("d", "c"))
    shards.publish(name_of(["a", "b"]), rows("a", "b"))
    shards.publish(name_of(["b"]), rows("b"))
    shards.reject("x", [Rejected("e", "invalid", "no tokens")])
    assert shards.read().column("id").to_pylist() == ["a", "b", "c", "d"]
    assert shards.done().tolist() == np.sort(hash_ids(["a", "b", "c", "d", "e"])).tolist()
    assert shards.has(name_of(["b"]))
    assert not shards.has(name_of(["a"]))
    assert shards.rejected() == [Rejected("e", "invalid", "no tokens")]


def test_other_parameters_are_refused_by_name(tmp_path: Path) -> None:
    folder(tmp_path).claim({"work": {"n": 2, "stop": ["\n"]}, "model": "m"})
    folder(tmp_path).claim({"work": {"n": 2, "stop": ["\n"]}, "model": "m"})
    with pytest.raises(
        UserError, match=r'work\.n: 2 there, 3 asked for; work\.stop: \["\\n"\] there, \[\] asked for'
    ):
        folder(tmp_path).claim({"work": {"n": 3, "stop": []}, "model": "m"})


def test_an_older_run_cannot_publish(tmp_path: Path) -> None:
    """An actor of a killed run may still live when the next run starts: it must not add rows behind its back."""
    old, new = folder(tmp_path), folder(tmp_path)
    old.claim({})
    new.claim({})
    with pytest.raises(Superseded):
        old.publish("late", rows("a"))
    new.publish("mine", rows("a"))
    assert new.read().num_rows == 1


def test_nothing_half_written_is_read(tmp_path: Path) -> None:
    """A process killed while it writes leaves a .part file, which is no shard."""
    shards = folder(tmp_path)
    shards.claim({})
    (tmp_path / "abc.parquet.123.part").write_bytes(b"PAR1 half")
    assert shards.read().num_rows == 0
    assert len(shards.done()) == 0
    assert tables.TOKEN_SCORES.files(tmp_path) == []


def here() -> set[str]:
    return {"n1", "n2"}


def test_attempts_are_counted_until_they_end(tmp_path: Path) -> None:
    shards = folder(tmp_path)
    shards.claim({})
    assert shards.deaths("batch", here) == []
    shards.begin("batch", "n1")
    assert "died" in shards.deaths("batch", here)[0]
    shards.blame("batch", "n1", "MemoryError()")
    assert shards.deaths("batch", here) == ["MemoryError()"]
    shards.end("batch")
    assert shards.deaths("batch", here) == []
    shards.begin("batch", "n1")
    shards.keep("row", rows("a"))
    assert [row["id"] for row in shards.kept("row") or []] == ["a"]
    assert len(shards.done()) == 0, "what is kept is not published"
    folder(tmp_path).claim({})
    assert shards.deaths("batch", here) == [], "a killed run says nothing of its rows"
    assert shards.kept("row") is None


def test_attempts_that_were_lost_with_their_node_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes were taken away and one engine died at a node that stayed; a third lost node makes all four count."""
    shards = folder(tmp_path)
    shards.claim({})
    for number, node in enumerate(["gone1", "n2", "gone2"]):
        monkeypatch.setattr("allo_ray.data.shards._PROCESS", f"process{number}")
        shards.blame("batch", node, f"died at {node}")
    assert shards.deaths("batch", here) == ["died at n2"]
    monkeypatch.setattr("allo_ray.data.shards._PROCESS", "process3")
    shards.blame("batch", "gone3", "died at gone3")
    assert len(shards.deaths("batch", here)) == 4


@pytest.mark.parametrize("where", ["local", "memory"])
def test_indexed_shards_are_not_opened(where: str, tmp_path: Path) -> None:
    """What is done is known from the index though the shards cannot be read; a shard that is gone is not done."""
    shards = folder(tmp_path if where == "local" else f"memory://index-{tmp_path.name}")
    shards.claim({})
    files = [shards.publish(name_of([one]), rows(one)) for one in ("a", "b")]
    files.append(
        shards.reject("x", [Rejected("c", "invalid", "no tokens"), Rejected("d", "invalid", "long")])
    )
    answered = Answered.of(files, [["a"], ["b"], ["c", "d"]])
    shards.index(Answered.from_bytes(answered.to_bytes()))
    system, root = fsspec.core.url_to_fs(shards.url)
    system.pipe_file(f"{root}/{files[0]}", b"no parquet")
    assert shards.done().tolist() == np.sort(hash_ids(["a", "b", "c", "d"])).tolist()
    late = shards.publish(name_of(["e"]), rows("e"))
    assert set(shards.done()) == set(hash_ids(["a", "b", "c", "d", "e"])), "the newest is opened"
    system.pipe_file(f"{root}/{late}", b"no parquet")
    assert len(shards.done()) == 5, "and indexed at once"
    system.rm_file(f"{root}/{files[2]}")
    assert set(shards.done()) == set(hash_ids(["a", "b", "e"]))


def test_a_check_writes_nothing(tmp_path: Path) -> None:
    folder(tmp_path / "new").check({"a": 1})
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is no folder to write to"):
        folder(tmp_path / "file").check({"a": 1})


def test_names_tell_where_ids_end() -> None:
    assert name_of(["ab", "c"]) != name_of(["a", "bc"])
    assert name_of(["a", "b"]) != name_of(["b", "a"])
