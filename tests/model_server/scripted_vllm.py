"""Stands in for ``vllm serve``: answers ``/health`` and the trial question under the name it was started with.

Beside the model's ``config.json`` it leaves a file ``started`` (one line per start) and ``asked`` (the trial question has come); as
long as there is a file ``hold`` the question stays unanswered, and with a file ``die`` the list of models ends it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--served-model-name")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    given, _ = parser.parse_known_args()
    with (given.model / "started").open("a") as file:
        file.write(f"{given.served_model_name}\n")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/v1/models" and (given.model / "die").exists():
                print("RuntimeError: out of luck", flush=True)
                os._exit(3)
            self._answer({})

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            (given.model / "asked").touch()
            while (given.model / "hold").exists():
                time.sleep(0.02)
            message = {"role": "assistant", "content": f"I am {given.served_model_name}"}
            self._answer({"model": given.served_model_name, "choices": [{"message": message}], "usage": {"completion_tokens": 3}})

        def _answer(self, body: dict) -> None:
            content = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    ThreadingHTTPServer((given.host, given.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
