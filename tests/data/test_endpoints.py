"""A server's answers, its failures and its tricks, over real HTTP."""

import pytest

from ultravox.audio.waveform import load_waveform
from ultravox.data.endpoints import MAX_TRIES, Endpoint, RefusedRequest
from ultravox.errors import NetworkError, UltravoxError


def endpoint(server, **options) -> tuple[Endpoint, list[float]]:
    waits: list[float] = []
    return Endpoint(server.url, "small", timeout=5, sleep=waits.append, **options), waits


def test_text_and_speech_come(speech_server):
    client, waits = endpoint(speech_server)
    assert client.chat("hello", seed=7) == '"The hello is here."\n'
    waveform = load_waveform(client.speech("ten letters", "alloy", 1.1))
    assert len(waveform) / 16000 == pytest.approx(0.02 * 11 / 1.1, abs=0.01)
    assert [body for _, _, body in speech_server.requests] == [
        {"model": "small", "messages": [{"role": "user", "content": "hello"}], "seed": 7},
        {"model": "small", "input": "ten letters", "voice": "alloy", "response_format": "wav", "speed": 1.1},
    ]
    assert waits == []
    assert "Authorization" not in speech_server.requests[0][1]


def test_a_busy_server_is_asked_again_as_late_as_it_says(speech_server):
    client, waits = endpoint(speech_server)
    speech_server.failures = [(429, {"Retry-After": "7"}, b""), (503, {}, b""), (500, {"Retry-After": "900"}, b"")]
    assert client.chat("hello", 0)
    assert waits == [7.0, 2.0, 60.0]


def test_a_server_that_never_works_is_given_up(speech_server):
    client, waits = endpoint(speech_server)
    speech_server.failures = [(502, {}, b"")] * MAX_TRIES
    with pytest.raises(NetworkError, match=r"gave no answer in 5 tries \(status 502\)"):
        client.chat("hello", 0)
    assert waits == [1.0, 2.0, 4.0, 8.0]


def test_no_server_is_one_line():
    waits: list[float] = []
    with pytest.raises(NetworkError, match=r":9/v1/chat/completions gave no answer in 5 tries \(.*refused\)") as caught:
        Endpoint("http://127.0.0.1:9/v1", "small", timeout=1, sleep=waits.append).chat("hello", 0)
    assert len(waits) == MAX_TRIES - 1
    assert "\n" not in str(caught.value)


def test_a_refused_request_is_not_tried_again(speech_server):
    client, waits = endpoint(speech_server)
    speech_server.refuse = "bad"
    with pytest.raises(RefusedRequest, match="status 400: against the rules"):
        client.speech("a bad text", "alloy", 1)
    assert waits == []


def test_a_redirect_is_not_followed(speech_server):
    client, _ = endpoint(speech_server)
    for status in (301, 302, 307, 308):
        speech_server.failures = [(status, {"Location": f"{speech_server.url}/elsewhere"}, b"")]
        with pytest.raises(NetworkError, match="redirects to another place"):
            client.chat("hello", 0)
    assert {path for path, _, _ in speech_server.requests} == {"/v1/chat/completions"}


def test_the_key_is_sent_and_never_said(speech_server, monkeypatch):
    monkeypatch.setenv("SECRET_OF_MINE", "sk-very-secret")
    client, _ = endpoint(speech_server, key_env="SECRET_OF_MINE")
    speech_server.failures = [(401, {}, b'{"error": {"message": "wrong key sk-very-secret given"}}')]
    with pytest.raises(NetworkError, match=r"status 401: wrong key \*\*\* given; check the key"):
        client.chat("hello", 0)
    assert speech_server.requests[0][1]["Authorization"] == "Bearer sk-very-secret"
    assert "sk-very-secret" not in repr(client)


@pytest.mark.parametrize(
    "answer", [b"not json", b"{}", b'{"choices": []}', b'{"choices": [{"message": null}]}', b"[1]"]
)
def test_something_else_than_a_completion_is_refused(answer, speech_server):
    client, _ = endpoint(speech_server)
    speech_server.failures = [(200, {}, answer)]
    with pytest.raises(NetworkError, match="something else than a chat completion"):
        client.chat("hello", 0)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8000",
        "ftp://example.com/v1",
        "file:///etc/passwd",
        "http://",
        "http://[::1",
        "http://localhost:x",
    ],
)
def test_only_http_is_spoken(url):
    with pytest.raises(UltravoxError, match="expected a URL such as"):
        Endpoint(url, "small")


@pytest.mark.parametrize("place", ["me:pass@localhost/v1", "localhost/v1?key=1", "localhost/v1#a"])
def test_a_url_holds_no_secret(place):
    with pytest.raises(UltravoxError, match="holds a user name, a query or a fragment") as caught:
        Endpoint(f"http://{place}", "small")
    assert "pass" not in str(caught.value)


@pytest.mark.parametrize(("value", "state"), [(None, "is not set"), ("  ", "is not set"), ("a\nb", "holds no key")])
def test_a_key_must_be_one(value, state, monkeypatch):
    monkeypatch.delenv("SECRET_OF_MINE", raising=False)
    if value is not None:
        monkeypatch.setenv("SECRET_OF_MINE", value)
    with pytest.raises(UltravoxError, match=f"SECRET_OF_MINE {state}"):
        Endpoint("http://localhost/v1", "small", "SECRET_OF_MINE")
