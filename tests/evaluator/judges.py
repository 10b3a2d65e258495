"""A judge over real HTTP: speaks OpenAI's chat completions, notes what it was asked, and fails as it is told to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from parampara.schemas.stages import JudgeEndpoint

Answer = tuple[int, dict[str, str], str]
"""Status, further headers, body."""


def completion(content: str | None, *, finish: str = "stop") -> Answer:
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": finish}
    return 200, {}, json.dumps({"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "judge", "choices": [choice]})


def graded(score: Any, reason: str = "It says the same.") -> Answer:
    return completion(json.dumps({"reason": reason, "score": score}))


def refused(status: int, message: str = "no", **headers: str) -> Answer:
    return status, headers, json.dumps({"error": {"message": message, "type": "x", "param": None, "code": "x"}})


@dataclass
class ScriptedJudge:
    """``answer`` gets what the judge is shown (question, reference_answer, answer) and how often it was asked that before."""

    answer: Callable[[dict[str, str], int], Answer] = lambda shown, before: graded(5)
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    most_at_once: int = 0

    @property
    def endpoint(self) -> JudgeEndpoint:
        return JudgeEndpoint(base_url=self.url, timeout_seconds=5, concurrency=3)


@contextmanager
def serving(judge: ScriptedJudge) -> Iterator[ScriptedJudge]:
    lock, running, asked = threading.Lock(), [0], dict[str, int]()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            shown = body["messages"][-1]["content"]
            with lock:
                running[0] += 1
                judge.most_at_once = max(judge.most_at_once, running[0])
                judge.requests.append({**body, "path": self.path})
                judge.keys.append(self.headers.get("authorization"))
                before = asked.get(shown, 0)
                asked[shown] = before + 1
            try:
                status, headers, text = judge.answer(json.loads(shown), before)
            finally:
                with lock:
                    running[0] -= 1
            content = text.encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            with suppress(ConnectionError):  # whoever asked may have gone
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    judge.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
