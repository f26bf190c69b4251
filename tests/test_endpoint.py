"""The client for chat completions, against a real server on this machine that misbehaves as told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from allo_ray.endpoint import Endpoint, RequestFailed
from allo_ray.errors import UserError

Reply = Callable[[dict[str, Any]], tuple[int, Any]]


class Server:
    """Answers POST /v1/chat/completions by `reply(body) -> (status, content or error)`; notes what it saw."""

    def __init__(self) -> None:
        self.reply: Reply = lambda body: (200, body["messages"][0]["content"].upper())
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.at_once = self.most_at_once = 0
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    outer.bodies.append(body)
                    outer.headers.append({key.lower(): value for key, value in self.headers.items()})
                    outer.at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer.at_once)
                status, content = outer.reply(body)
                with lock:
                    outer.at_once -= 1
                if self.path != "/v1/chat/completions":
                    status = 404
                told = (
                    {"choices": [{"message": {"content": content}}]} if status == 200 else {"error": content}
                )
                raw = json.dumps(told).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(raw)))
                if status == 429:
                    self.send_header("retry-after", "0.01")
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_: object) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.http.shutdown()
    running.http.server_close()


def endpoint(server: Server, **changes: Any) -> Endpoint:
    told = {"retries": 3, "first_pause_seconds": 0.01, "timeout_seconds": 20, "key_variable": "ALLO_TEST_KEY"}
    return Endpoint(server.url, "judge", **(told | changes))


def ask(client: Endpoint, *texts: str, **options: Any) -> dict[str, Any]:
    requests = ((text, [{"role": "user", "content": text}]) for text in texts)
    return dict(client.complete(requests, **options))


def test_answers_come_with_their_ids_and_options_go_out(server: Server) -> None:
    told = ask(endpoint(server), *(f"q{i}" for i in range(40)), temperature=0, max_tokens=7)
    assert told == {f"q{i}": f"Q{i}" for i in range(40)}
    assert {(body["model"], body["temperature"], body["max_tokens"]) for body in server.bodies} == {
        ("judge", 0, 7)
    }


def test_what_passes_is_tried_again(server: Server) -> None:
    seen: dict[str, int] = {}

    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        text = body["messages"][0]["content"]
        seen[text] = seen.get(text, 0) + 1
        return (200, "done") if seen[text] == 3 else (429 if seen[text] == 1 else 503, "busy")

    server.reply = reply
    assert ask(endpoint(server), "a", "b") == {"a": "done", "b": "done"}
    assert seen == {"a": 3, "b": 3}


def test_what_fails_for_good_is_told_and_the_rest_goes_on(server: Server) -> None:
    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        text = body["messages"][0]["content"]
        return {"long": (400, "context too long"), "down": (500, "no")}.get(text, (200, "ok"))

    server.reply = reply
    told = ask(endpoint(server), "long", "down", "fine")
    assert told["fine"] == "ok"
    assert isinstance(told["long"], RequestFailed)
    assert "context too long" in str(told["long"])
    assert "status 500 after 4 attempts" in str(told["down"])
    assert len(server.bodies) == 1 + 4 + 1


def test_key_goes_into_the_header_and_nowhere_else(
    server: Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ALLO_TEST_KEY", "sk-secret")
    client = endpoint(server)
    ask(client, "a")
    assert server.headers[0]["authorization"] == "Bearer sk-secret"
    server.reply = lambda body: (401, "bad key")
    with pytest.raises(UserError, match="ALLO_TEST_KEY, which is set") as caught:
        ask(client, "a", "b", "c")
    told = "".join([str(caught.value), repr(client), *capfd.readouterr()])
    assert "sk-secret" not in told


def test_without_a_key_none_is_sent(server: Server) -> None:
    ask(endpoint(server), "a")
    assert "authorization" not in server.headers[0]
    server.reply = lambda body: (403, "no key")
    with pytest.raises(UserError, match="which is not set"):
        ask(endpoint(server), "a")


def test_wrong_model_and_dead_server_are_the_users_errors(server: Server) -> None:
    server.reply = lambda body: (404, "no model")
    with pytest.raises(UserError, match=r"no such model \(judge\)"):
        ask(endpoint(server), "a")
    dead = Endpoint("http://127.0.0.1:9/v1", "judge", retries=1, first_pause_seconds=0.01)
    with pytest.raises(UserError, match="Is the server running"):
        ask(dead, "a")


def test_a_slow_server_is_given_up_after_the_timeout(server: Server) -> None:
    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(1.0)
        return 200, "late"

    server.reply = reply
    told = ask(endpoint(server, timeout_seconds=0.2, retries=0), "a")
    assert "ReadTimeout" in str(told["a"])


def test_no_more_is_taken_than_is_under_way(server: Server) -> None:
    """Ten million requests are not ten million objects: the source is read as answers come."""
    taken = 0

    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(0.01)
        return 200, "ok"

    server.reply = reply

    def source() -> Iterator[tuple[str, list[dict[str, str]]]]:
        nonlocal taken
        for number in range(200):
            taken += 1
            yield str(number), [{"role": "user", "content": "x"}]

    for count, _ in enumerate(endpoint(server, concurrency=4).complete(source()), start=1):
        assert taken <= count + 8
    assert 1 < server.most_at_once <= 4
