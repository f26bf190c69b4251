"""A client for chat completions of any OpenAI-compatible server: many requests at once, patient, resumable by its user.

The key comes from an environment variable, goes into the request's header, and is written nowhere else.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import httpx

from allo_ray.errors import UserError

Messages = Sequence[Mapping[str, str]]
#: Status codes that may be other the next time.
TRY_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
LONGEST_PAUSE_SECONDS = 60.0


class RequestFailed(RuntimeError):
    """One request got no answer, after all its retries."""


@dataclass(frozen=True)
class Endpoint:
    """A model behind a base URL such as `http://localhost:8000/v1`.

    `key_variable` names the environment variable with the key; where it is unset, no key is sent.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    concurrency: int = 16
    timeout_seconds: float = 120
    retries: int = 5
    first_pause_seconds: float = field(default=1.0, repr=False)

    def complete(
        self, requests: Iterable[tuple[str, Messages]], **options: Any
    ) -> Iterator[tuple[str, str | RequestFailed]]:
        """Yields (id, text) for (id, messages) as the answers come in; RequestFailed in the place of what failed.

        At most twice `concurrency` requests are taken from `requests` ahead of the answers. `options` go into each
        request (temperature, top_p, max_tokens, stop).

        Raises:
            UserError: the server cannot be reached at all, or refuses the key, the model or the options.
        """
        headers = {"Authorization": f"Bearer {key}"} if (key := os.environ.get(self.key_variable)) else {}
        limits = httpx.Limits(max_connections=self.concurrency)
        timeout = httpx.Timeout(self.timeout_seconds, connect=min(10.0, self.timeout_seconds))
        source = iter(requests)
        with (
            httpx.Client(headers=headers, limits=limits, timeout=timeout) as client,
            ThreadPoolExecutor(self.concurrency, thread_name_prefix="endpoint") as pool,
        ):
            running: dict[Future[str], str] = {}
            more = True
            while more or running:
                while more and len(running) < 2 * self.concurrency:
                    found = next(source, None)
                    more = found is not None
                    if found is not None:
                        running[pool.submit(self._ask, client, found[1], options)] = found[0]
                if not running:
                    break
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    name = running.pop(future)
                    try:
                        yield name, future.result()
                    except RequestFailed as error:
                        yield name, error
                    except UserError:
                        pool.shutdown(wait=False, cancel_futures=True)
                        raise

    def _ask(self, client: httpx.Client, messages: Messages, options: Mapping[str, Any]) -> str:
        body = {"model": self.model, "messages": list(messages), **options}
        reason = ""
        for attempt in range(self.retries + 1):
            pause = min(LONGEST_PAUSE_SECONDS, self.first_pause_seconds * 2**attempt)
            try:
                response = client.post(f"{self.url.rstrip('/')}/chat/completions", json=body)
            except httpx.ConnectError as error:
                reason = f"no connection ({error})"
            except httpx.HTTPError as error:
                reason = f"{type(error).__name__}"
            else:
                if response.is_success:
                    return _text(response)
                reason = f"status {response.status_code}"
                if response.status_code not in TRY_AGAIN:
                    self._refused(response)
                pause = max(pause, _retry_after(response))
            if attempt < self.retries:
                time.sleep(pause * random.uniform(0.5, 1.0))
        if reason.startswith("no connection"):
            raise UserError(
                f"{self.url}: {reason}. Is the server running, and is the URL right (it ends in /v1)?"
            )
        raise RequestFailed(f"{reason} after {self.retries + 1} attempts")

    def _refused(self, response: httpx.Response) -> None:
        """Raises what a refusal means: for the whole run, or (400: a context too long, say) for this request alone."""
        if response.status_code in (401, 403):
            known = "is set" if os.environ.get(self.key_variable) else "is not set"
            raise UserError(
                f"{self.url}: the server refuses the key (status {response.status_code}). It is read from the "
                f"environment variable {self.key_variable}, which {known}."
            )
        if response.status_code == 404:
            raise UserError(f"{self.url}: status 404: no such model ({self.model}) or URL. Check both.")
        raise RequestFailed(f"status {response.status_code}: {_excerpt(response)}")


def _text(response: httpx.Response) -> str:
    try:
        content = response.json()["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        raise RequestFailed("the answer is no chat completion") from None
    return content or ""


def _retry_after(response: httpx.Response) -> float:
    try:
        return min(LONGEST_PAUSE_SECONDS, float(response.headers.get("retry-after", 0)))
    except ValueError:
        return 0.0


def _excerpt(response: httpx.Response) -> str:
    return " ".join(response.text[:200].split())
