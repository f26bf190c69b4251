"""P_re from one tokenizer to another, by characters."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allo_ray.data.align_tokens import align, carry_over, ranges
from allo_ray.data.tokenise import Tokeniser
from allo_ray.models import smollm2_tokenizer

TEXTS = [
    " 17 + 25 = 42. The answer is 42",
    "  two  blanks",
    "naïve café 你好 😀!",
    "1,000,000.50",
    "",
    "\n\n a\n",
]


@pytest.fixture(scope="module")
def policy(tiny_llama: Path) -> Tokeniser:
    return Tokeniser(str(tiny_llama))


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Tokeniser:
    """A second real tokenizer that cuts elsewhere: words with their blank in front, numbers whole."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    text = "The answer is 42. So 17 + 25 = 42, and 100 is more than 99 café naïve 你好 " * 4
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=["</s>"], initial_alphabet=alphabet)
    words.train_from_iterator([text], trainer)
    folder = tmp_path_factory.mktemp("words")
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(folder)
    return Tokeniser(str(folder))


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Tokeniser:
    """SmolLM2's own: byte-level BPE, digits one by one, words with their blank in front."""
    folder = tmp_path_factory.mktemp("smollm2")
    smollm2_tokenizer().save_pretrained(folder)
    return Tokeniser(str(folder))


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Tokeniser:
    """Mistral 7B's own, a SentencePiece model in a package that vLLM brings: a sign for blanks, one set before the
    text, single bytes for characters that it does not know."""
    found = importlib.util.find_spec("mistral_common")
    assert found is not None
    assert found.origin is not None
    folder = tmp_path_factory.mktemp("mistral")
    shutil.copy(Path(found.origin).parent / "data" / "tokenizer.model.v1", folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    return Tokeniser(str(folder))


def brute(policy: list[tuple[int, int]], reward: list[tuple[int, int]], p_re: list[float]) -> list[float]:
    """Decision 10, word for word."""
    out = []
    for start, end in policy:
        if start == end:
            over = [p for p, piece in zip(p_re, reward, strict=True) if piece == (start, end)]
        else:
            over = [p for p, (low, high) in zip(p_re, reward, strict=True) if low < end and start < high]
        out.append(min(over, default=1.0))
    return out


def test_minimum_over_the_tokens_that_overlap() -> None:
    """Policy |ab|cd|e|, reward |a|bcd|e|: `ab` overlaps both of the first two, so min(0.9, 0.2)."""
    told = align([(0, 2), (2, 4), (4, 5)], [(0, 1), (1, 4), (4, 5)], [0.9, 0.2, 0.6])
    assert told.dtype == np.float32
    assert told.tolist() == pytest.approx([0.2, 0.2, 0.6])


def test_end_token_takes_the_other_end_token() -> None:
    told = align([(0, 2), (2, 2)], [(0, 1), (1, 2), (2, 2)], [0.5, 0.4, 0.1])
    assert told.tolist() == pytest.approx([0.4, 0.1])


def test_what_nothing_overlaps_is_not_held_against() -> None:
    assert align([(0, 1), (3, 4)], [(0, 1)], [0.5]).tolist() == [0.5, 1.0]
    assert align([(0, 1)], [], []).tolist() == [1.0]


@st.composite
def cuts(draw: st.DrawFn, length: int) -> list[tuple[int, int]]:
    inner = sorted(draw(st.sets(st.integers(1, max(1, length - 1)), max_size=length)) | {0, length})
    return list(zip(inner[:-1], inner[1:], strict=True)) + [(length, length)]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_agrees_with_the_definition(data: st.DataObject) -> None:
    length = data.draw(st.integers(2, 30))
    own, theirs = data.draw(cuts(length)), data.draw(cuts(length))
    p_re = data.draw(st.lists(st.floats(0, 1, width=32), min_size=len(theirs), max_size=len(theirs)))
    assert align(own, theirs, p_re).tolist() == pytest.approx(brute(own, theirs, p_re))


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
@pytest.mark.parametrize("swapped", [False, True])
def test_real_tokenizers_with_any_text(
    policy: Tokeniser, reward: Tokeniser, swapped: bool, text: str
) -> None:
    """Every policy token gets the score of a reward token that shares a character with it; the ends match."""
    own, other = (reward, policy) if swapped else (policy, reward)
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    if any(name in text for name in ("<pad>", "<bos>", "<eos>", "</s>")):
        return
    ids, theirs = own.response(text), other.response(text)
    scores = np.linspace(0.1, 0.9, len(theirs))
    told = carry_over(own, other, ids, scores)
    assert len(told) == len(ids)
    assert told[-1] == pytest.approx(scores[-1])
    assert set(np.round(told, 5)) <= set(np.round(scores.astype(np.float32), 5))
    # Where a token is the minimum of all it overlaps, scores that rise give scores that never fall.
    assert (np.diff(told) >= -1e-6).all()


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("names", [("policy", "reward"), ("smollm2", "mistral"), ("mistral", "smollm2")])
def test_equal_scores_stay_equal_and_one_low_score_marks_its_characters(
    names: tuple[str, str], text: str, request: pytest.FixtureRequest
) -> None:
    """Also between the tokenizers of two real models. The text is that of the policy's ids: SentencePiece drops a blank
    in front when it decodes."""
    policy, reward = (request.getfixturevalue(name) for name in names)
    ids = policy.response(text)
    shown, own = ranges(policy, ids)
    assert shown.strip() == text.strip()
    theirs = reward.response(shown)
    even = carry_over(policy, reward, ids, np.full(len(theirs), 0.7))
    assert even.tolist() == pytest.approx([0.7] * len(ids))
    for place, (low, high) in enumerate(reward.offsets(shown)):
        scores = np.ones(len(theirs))
        scores[place] = 0.0
        told = carry_over(policy, reward, ids, scores)
        for score, (start, end) in zip(told, own, strict=True):
            assert (score == 0) == (start < high and low < end)


def test_sampled_ids_need_not_be_the_tokenizers_choice(policy: Tokeniser) -> None:
    """A model may spell a word byte by byte; the ranges still cover the text, each byte's its own."""
    text = "The answer ü"
    ids = [policy.plain(sign)[0] for sign in "The answer "] + policy.plain("ü")
    assert ids != policy.plain(text)
    told, own = ranges(policy, [*ids, policy.eos])
    assert told == text
    assert own[:11] == [(i, i + 1) for i in range(11)]
    assert {*own[11:-1]} == {(11, 12)}
    assert own[-1] == (12, 12)


def test_a_response_that_never_ended_has_no_end_score(policy: Tokeniser, reward: Tokeniser) -> None:
    ids = policy.response("42 42", end=False)
    scores = np.full(len(reward.response("42 42", end=False)), 0.3)
    assert carry_over(policy, reward, ids, scores).tolist() == pytest.approx([0.3] * len(ids))
