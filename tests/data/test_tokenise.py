"""Tokenisation: prompt and response apart, one BOS at most, EOS at the end of human responses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allo_ray.data.tokenise import Tokeniser
from allo_ray.errors import UserError


def _with_bos(folder: Path, to: Path) -> Path:
    """A copy of the tiny model whose tokenizer puts BOS in front, as Llama 2's does."""
    shutil.copytree(folder, to)
    told = json.loads((to / "tokenizer.json").read_text())
    told["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [1], "tokens": ["<bos>"]}},
    }
    (to / "tokenizer.json").write_text(json.dumps(told))
    return to


def test_response_ends_with_one_eos(tokeniser: Tokeniser) -> None:
    ids = tokeniser.response(" 42")
    assert ids[-1] == tokeniser.eos
    assert ids.count(tokeniser.eos) == 1
    assert tokeniser.response(" 42<eos>") == ids
    assert tokeniser.response(" 42", end=False) == ids[:-1]


def test_no_bos_where_the_tokenizer_puts_none(tokeniser: Tokeniser) -> None:
    assert tokeniser.bos not in tokeniser.prompt("1 + 1")


def test_one_bos_where_the_tokenizer_puts_one(tiny_llama: Path, tmp_path: Path) -> None:
    """Also where the template already spells it, once or twice: the peers' most reported bug."""
    tokeniser = Tokeniser(str(_with_bos(tiny_llama, tmp_path / "bos")))
    plain = tokeniser.plain("1 + 1")
    for text in ("1 + 1", "<bos>1 + 1", "<bos><bos>1 + 1"):
        assert tokeniser.prompt(text) == [tokeniser.bos, *plain]
    assert tokeniser.bos not in tokeniser.response("1 + 1")


def test_only_special(tokeniser: Tokeniser) -> None:
    assert tokeniser.only_special(tokeniser.plain("<bos><eos>"))
    assert not tokeniser.only_special(tokeniser.plain("<bos>a"))


def test_more_ids_than_rows_is_the_users_error(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(UserError, match="vocabulary has 100"):
        Tokeniser(str(folder))


def test_no_tokenizer_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer cannot be loaded.*model\.path"):
        Tokeniser(str(tmp_path))


def test_same_as_compares_what_tokenizers_do(tiny_llama: Path, tiny_qwen: Path, tmp_path: Path) -> None:
    """The Qwen tokenizer normalises text (NFC), the other does not, though both have one vocabulary."""
    first = Tokeniser(str(tiny_llama))
    shutil.copytree(tiny_llama, tmp_path / "copy")
    assert first.same_as(Tokeniser(str(tmp_path / "copy")))
    assert not first.same_as(Tokeniser(str(tiny_qwen)))
    assert not first.same_as(Tokeniser(str(_with_bos(tiny_llama, tmp_path / "bos"))))


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60))
def test_ids_give_the_text_back(tokeniser: Tokeniser, text: str) -> None:
    """A byte-level tokenizer loses nothing, whatever the text (special tokens spelt out aside)."""
    for name in ("<pad>", "<bos>", "<eos>"):
        text = text.replace(name, "")
    try:
        text.encode()
    except UnicodeEncodeError:
        return  # a lone surrogate is no text
    assert tokeniser.text(tokeniser.plain(text)) == text
    assert tokeniser.plain(text) == list(tokeniser.hf(text, add_special_tokens=False).input_ids)


def test_limits_kept_in_the_tokenizer_file_cut_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(tiny_llama, folder)
    told = json.loads((folder / "tokenizer.json").read_text())
    told["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(told))
    text = "The answer is not three tokens long"
    assert Tokeniser(str(folder)).plain(text) == Tokeniser(str(tiny_llama)).plain(text)


def test_spelling_shows_text_or_the_name(tokeniser: Tokeniser) -> None:
    assert tokeniser.spelling(tokeniser.eos) == "<eos>"
    assert tokeniser.spelling(tokeniser.plain("7")[0]) == "7"
