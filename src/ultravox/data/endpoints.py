"""Servers with OpenAI's interface: texts from a language model, speech from a text-to-speech model.

Only ``http`` and ``https``; no redirects, so that neither key nor text reaches a host that was not named; an API key
comes from an environment variable alone and is written nowhere.
"""

import contextlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from ultravox.errors import NetworkError, UltravoxError

MAX_RESPONSE_BYTES = 64 << 20
MAX_WAIT_SECONDS = 60.0
MAX_TRIES = 5
MAX_MESSAGE = 200  # characters of a server's words in an error
REFUSED = (400, 413, 422)  # this request cannot be served; the next one may be


class RefusedRequest(NetworkError):
    """The server answers, but not this request: its text is too long, or against its rules."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


@dataclass(frozen=True)
class Endpoint:
    """One server.

    Args:
        url: up to and with its version, as ``https://example.com/v1``.
        model: the model's name there.
        key_env: name of the environment variable with the API key; empty = no key.
        timeout: seconds without a byte from the server.
        sleep: how to wait between two tries.

    Raises:
        UltravoxError: a URL that is none, or that holds a password; a variable that is not set.
    """

    url: str
    model: str
    key_env: str = ""
    timeout: float = 120.0
    sleep: Callable[[float], None] = field(default=time.sleep, compare=False, repr=False)

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            host, _ = parts.hostname, parts.port
        except ValueError:
            host = None
        if host is None or parts.scheme not in ("http", "https"):
            raise UltravoxError(f"expected a URL such as http://localhost:8000/v1, got {self.url!r}")
        if parts.username is not None or parts.query or parts.fragment:
            raise UltravoxError(
                f"the URL of {host} holds a user name, a query or a fragment: give scheme, host and path alone, and a "
                "key in an environment variable"
            )
        if self.key_env and not (self._key and self._key.isascii() and self._key.isprintable()):
            state = "holds no key" if self._key else "is not set"
            raise UltravoxError(f"the environment variable {self.key_env} {state}: expected the API key of {host}")

    @property
    def _key(self) -> str:
        return os.environ.get(self.key_env, "").strip() if self.key_env else ""

    def chat(self, prompt: str, seed: int) -> str:
        """What the model writes to one message of a user's."""
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "seed": seed}
        data = self._post("chat/completions", body)
        try:
            text = json.loads(data)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise NetworkError(f"{self.url} sent something else than a chat completion: {self._said(data)}") from error
        return text if isinstance(text, str) else ""

    def speech(self, text: str, voice: str, speed: float) -> bytes:
        """An audio file's content; ``speed`` above 1 is faster."""
        body = {"model": self.model, "input": text, "voice": voice, "response_format": "wav", "speed": speed}
        return self._post("audio/speech", body)

    def _post(self, path: str, body: Mapping[str, Any]) -> bytes:
        address = f"{self.url.rstrip('/')}/{path}"
        headers = {"Content-Type": "application/json", "User-Agent": "ultravox"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        opener = urllib.request.build_opener(_NoRedirect)
        for attempt in range(MAX_TRIES):
            request = urllib.request.Request(address, json.dumps(body).encode(), headers, method="POST")
            try:
                with opener.open(request, timeout=self.timeout) as response:
                    data = response.read(MAX_RESPONSE_BYTES + 1)
            except urllib.error.HTTPError as error:
                wait = self._explain(address, error)
                reason = f"status {error.code}"
            except (OSError, http.client.HTTPException) as error:  # refused, reset, too slow, cut short
                wait, reason = 0.0, str(getattr(error, "reason", "") or error or type(error).__name__)
            else:
                if len(data) > MAX_RESPONSE_BYTES:
                    raise NetworkError(f"{address} sent more than {MAX_RESPONSE_BYTES >> 20} MiB in one answer")
                return data
            if attempt < MAX_TRIES - 1:
                self.sleep(min(MAX_WAIT_SECONDS, max(wait, 2.0**attempt)))
        raise NetworkError(
            f"{address} gave no answer in {MAX_TRIES} tries ({reason}): is the server up? Run this again"
        )

    def _explain(self, address: str, error: urllib.error.HTTPError) -> float:
        """Seconds to wait before another try, for an error that may pass; else raise."""
        if error.code == 429 or error.code >= 500:
            wait = (error.headers.get("Retry-After") or "").strip()
            return float(wait) if wait.isdecimal() else 0.0
        if 300 <= error.code < 400:
            raise NetworkError(f"{address} redirects to another place, which is not followed: give the final URL")
        message = f"{address} answered with status {error.code}: {self._said(error.read(1 << 16))}"
        hint = {401: "; check the key", 403: "; check the key", 404: "; check URL and model"}.get(error.code, "")
        raise (RefusedRequest if error.code in REFUSED else NetworkError)(message + hint)

    def _said(self, data: bytes) -> str:
        """The start of a server's message on one line, without the key, which some servers repeat."""
        text = data.decode("utf-8", errors="replace")
        with contextlib.suppress(ValueError, LookupError, TypeError):  # then it is not OpenAI's form
            text = str(json.loads(text)["error"]["message"])
        text = " ".join((text.replace(self._key, "***") if self._key else text).split())
        return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}…"
