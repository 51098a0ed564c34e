"""A real HTTP server with OpenAI's two endpoints, which writes sentences and hums them."""

import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import soundfile


class Server(ThreadingHTTPServer):
    """`requests` are what came: path, headers, body. `failures` are answered first: status, headers, body."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[tuple[str, dict, dict]] = []
        self.failures: list[tuple[int, dict, bytes]] = []
        self.refuse = ""  # words whose speech is refused

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, dict(self.headers), body))
        if self.server.failures:
            return self.answer(*self.server.failures.pop(0))
        if self.path == "/v1/chat/completions":
            prompt = body["messages"][0]["content"]
            word = prompt.split('"')[1] if '"' in prompt else prompt
            content = f'"The {word} is here."\n'
            return self.answer(200, {}, json.dumps({"choices": [{"message": {"content": content}}]}).encode())
        if self.path != "/v1/audio/speech":
            return self.answer(404, {}, b"nothing here")
        if self.server.refuse and self.server.refuse in body["input"]:
            return self.answer(400, {}, b'{"error": {"message": "against the rules"}}')
        buffer = io.BytesIO()
        seconds = 0.02 * len(body["input"]) / body["speed"]
        soundfile.write(buffer, np.sin(np.arange(int(24_000 * seconds)) * 0.1), 24_000, format="WAV")
        return self.answer(200, {}, buffer.getvalue())

    do_GET = do_POST

    def answer(self, status: int, headers: dict, body: bytes) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


@contextmanager
def serving() -> Iterator[Server]:
    """A server on a free port of this machine, for the length of a block."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
