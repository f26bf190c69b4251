"""Text to token ids: prompt and response separately, ids joined by concatenation, at most one BOS, in front.

Nothing else in the program tokenises, so training, sampling and scoring see the same ids.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from allo_ray.errors import UserError


class Tokeniser:
    """A transformers tokenizer with this program's rules for BOS and EOS.

    It travels to Ray tasks as the name of its folder; each process loads it once.
    """

    def __init__(self, folder: str, trust_remote_code: bool = False) -> None:
        """Loads the tokenizer of a model folder or hub name and checks that it fits the model.

        Raises:
            UserError: there is no tokenizer, it has no EOS token, or it knows ids that the model does not.
        """
        from transformers import AutoTokenizer

        try:
            self.hf: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{folder}: the tokenizer cannot be loaded ({reason}). Check model.path."
            ) from None
        if self.hf.eos_token_id is None:
            raise UserError(
                f"{folder}: the tokenizer has no EOS token, so responses would have no end. Set eos_token."
            )
        self.folder, self._trusts = folder, trust_remote_code
        self.eos: int = self.hf.eos_token_id
        self.bos: int | None = self.hf.bos_token_id
        self._adds_bos = self.bos is not None and self.hf("a").input_ids[:1] == [self.bos]
        self._special = set(self.hf.all_special_ids)
        check_vocabulary(folder, len(self.hf))
        self._backend: Any = self.hf.backend_tokenizer if self.hf.is_fast else None
        if self._backend is not None:  # some tokenizer files keep the limits of whoever saved them
            self._backend.no_truncation()
            self._backend.no_padding()

    def __reduce__(self) -> tuple[Callable[..., Tokeniser], tuple[str, bool]]:
        return _loaded, (self.folder, self._trusts)

    def prompt(self, text: str) -> list[int]:
        """Ids of a prompt. BOS comes first if the tokenizer's own rule puts it there, and never twice."""
        ids = self.plain(text)
        if self._adds_bos and ids[:1] != [self.bos]:
            ids = [self.bos, *ids]
        while len(ids) > 1 and ids[0] == ids[1] == self.bos:  # a template that spells BOS twice
            ids = ids[1:]
        return ids

    def response(self, text: str, end: bool = True) -> list[int]:
        """Ids of a response, without BOS; EOS at the end, once, where `end` says that the response is complete."""
        ids = self.plain(text)
        if end and ids[-1:] != [self.eos]:
            ids = [*ids, self.eos]
        return ids

    def plain(self, text: str) -> list[int]:
        """Ids of the text alone; special tokens only where the text spells them."""
        if self._backend is not None:  # the same ids as below, in a third of the time
            return self._backend.encode(text, add_special_tokens=False).ids
        return list(self.hf(text, add_special_tokens=False).input_ids)

    def text(self, ids: list[int]) -> str:
        """The text of ids, special tokens left out, spaces as they are."""
        return self.hf.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def spelling(self, token: int) -> str:
        """One token as a reader sees it; what is no text of its own (a special token) by its name."""
        text = self.hf.decode([token], clean_up_tokenization_spaces=False)
        return self.hf.convert_ids_to_tokens(token) if token in self._special or "\ufffd" in text else text

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Character ranges [start, end) of the ids that `plain` gives. Needs a fast tokenizer.

        Raises:
            UserError: the tokenizer is one of the slow ones.
        """
        if not self.hf.is_fast:
            raise UserError(
                f"{self.folder}: a slow tokenizer knows no offsets; use one with a tokenizer.json"
            )
        encoded = self.hf(text, add_special_tokens=False, return_offsets_mapping=True)
        return [(start, end) for start, end in encoded["offset_mapping"]]

    def is_special(self, token: int) -> bool:
        """True for tokens such as BOS and EOS, which are no text."""
        return token in self._special

    def same_as(self, other: Tokeniser) -> bool:
        """True where both give every text the same ids."""
        if self.folder == other.folder:
            return True
        if self.hf.is_fast and other.hf.is_fast:
            return (
                self.hf.backend_tokenizer.to_str() == other.hf.backend_tokenizer.to_str()
                and self.eos == other.eos
            )
        return False

    def only_special(self, ids: list[int]) -> bool:
        """True where the ids hold nothing but special tokens."""
        return all(token in self._special for token in ids)


@lru_cache(maxsize=8)
def _loaded(folder: str, trust_remote_code: bool) -> Tokeniser:
    return Tokeniser(folder, trust_remote_code)


def check_vocabulary(folder: str, tokens: int) -> None:
    """Raises UserError where a local model folder's embedding has fewer rows than the tokenizer has ids."""
    config = Path(folder) / "config.json"
    if not config.is_file():
        return
    values = json.loads(config.read_text(encoding="utf-8"))
    rows = values.get("vocab_size") or values.get("text_config", {}).get("vocab_size")
    if rows is not None and tokens > rows:
        raise UserError(
            f"{folder}: the tokenizer has {tokens} ids, but the model's vocabulary has {rows}. "
            "They belong to different models: put the right tokenizer into the folder, or resize the embeddings."
        )
