"""The text of a response as it grows, and where its stop string is; token by token, as vLLM does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class GrowingText:
    """Decodes one token after the other. An unfinished character stays back until its last byte is there."""

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], stop: Sequence[str]) -> None:
        """`tokenizer` is a transformers tokenizer with a fast backend; the prompt decides on a leading blank."""
        self._backend = tokenizer.backend_tokenizer
        self._stream = DecodeStream(ids=list(prompt_ids), skip_special_tokens=True)
        self._stop = tuple(stop)
        self.text = ""

    def add(self, token: int) -> bool:
        """Appends a token. True once the text has a stop string; the text is then cut before it."""
        before = len(self.text)
        self.text += self._step(token)
        for stop in self._stop:
            found = self.text.find(stop, max(0, before - len(stop) + 1))
            if found >= 0:
                self.text = self.text[:found]
                return True
        return False

    def _step(self, token: int) -> str:
        try:
            return self._stream.step(self._backend, token) or ""
        except Exception as error:
            # The tokenizers library raises a bare Exception where bytes that are no text upset the stream.
            if not str(error).startswith("Invalid prefix encountered"):
                raise
            self._stream = DecodeStream(skip_special_tokens=True)
            return self._stream.step(self._backend, token) or ""
