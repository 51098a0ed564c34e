"""``ultravox auth check``: the table, the JSON, the exit codes; and never a value."""

import json
import os
from types import SimpleNamespace

import pytest

from ultravox.auth.credentials import CREDENTIALS
from ultravox.cli.main import ACTIONS, COMMANDS, FROM_HUB, main

TOKEN = "hf_canaryCanaryCanaryCanaryCanary0123"
KEY = "canary0123456789canary0123456789canary0123456789"


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """A user without logins, in an empty folder."""
    for name in (*(c.variable for c in CREDENTIALS), "HF_HOME", "HF_TOKEN_PATH", "XDG_CACHE_HOME", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("AZURE_KEY_VAULT_URL", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def leaks(text: str) -> bool:
    """Whether any six characters of a secret, or its length, can be read."""
    pieces = {secret[i : i + 6] for secret in (TOKEN, KEY) for i in range(len(secret) - 5)}
    return any(piece in text for piece in pieces) or any(str(len(secret)) in text for secret in (TOKEN, KEY))


@pytest.mark.parametrize(
    "words",
    [
        ["ask", "hub/model", "--audio", "x.wav", "question"],
        ["evaluate", "hub/model"],
        ["data", "inspect", "hub/set"],
        ["diagnose", "x.yaml"],
        ["models"],
        ["checkpoint", "convert", "runs/x", "--output", "y"],
    ],
)
def test_a_command_that_may_load_from_the_hub_has_the_same_token(nowhere, monkeypatch, words):
    """As the hub's own client sees it, while the command runs; a token in the environment comes first."""
    from importlib import import_module

    from huggingface_hub import get_token

    seen = []
    name = ".".join(words[:2]) if words[0] in ("data", "checkpoint") else words[0]
    module = import_module(f"ultravox.cli.{name}")
    monkeypatch.setattr(module, "add_arguments", lambda parser: parser.add_argument("words", nargs="*"))
    monkeypatch.setattr(module, "run", lambda args: seen.append(get_token()))
    (nowhere / ".env").write_text(f"HF_TOKEN={TOKEN}\nWANDB_API_KEY={KEY}\n")
    plain = [word for word in words if not word.startswith("--")]
    assert main(plain) == 0
    assert seen == [TOKEN]
    assert "HF_TOKEN" not in os.environ
    monkeypatch.setenv("HF_TOKEN", TOKEN[:-1] + "9")
    assert main(plain) == 0
    assert seen[1:] == [TOKEN[:-1] + "9"]


def test_every_command_is_judged():
    """One that is new says here whether it loads from the hub."""
    here = {"train", "data.list", "azureml.render", "azureml.submit", "auth.check"}
    here |= {"checkpoint.inspect", "checkpoint.verify"}
    names = {name for name in COMMANDS if name not in ACTIONS}
    names |= {f"{group}.{action}" for group, actions in ACTIONS.items() for action in actions}
    assert names - FROM_HUB == here
    assert names > FROM_HUB


def test_the_table(nowhere, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (nowhere / ".env").write_text(f"WANDB_API_KEY={KEY}\n")
    assert main(["auth", "check"]) == 0
    captured = capsys.readouterr()
    assert [line.split() for line in captured.out.splitlines()] == [
        ["name", "set", "valid", "in", "form", "from"],
        ["HF_TOKEN", "yes", "yes", "environment"],
        ["WANDB_API_KEY", "yes", "yes", ".env"],
        ["CLEARML_API_ACCESS_KEY", "no", "-", "-"],
        ["CLEARML_API_SECRET_KEY", "no", "-", "-"],
        ["CLEARML_API_HOST", "no", "-", "-"],
    ]
    assert not leaks(captured.out + captured.err)


def test_a_wrong_form_ends_in_2(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("WANDB_API_KEY", KEY[:30])
    assert main(["auth", "check", "--json"]) == 2
    captured = capsys.readouterr()
    content = json.loads(captured.out)
    assert content["version"] == 1
    rows = {row.pop("name"): row for row in content["credentials"]}
    assert rows["HF_TOKEN"] == {"set": True, "valid": True, "source": "environment"}
    assert rows["WANDB_API_KEY"] == {"set": True, "valid": False, "source": "environment"}
    assert rows["CLEARML_API_HOST"] == {"set": False, "valid": None, "source": None}
    assert list(rows) == [credential.variable for credential in CREDENTIALS]
    assert not leaks(captured.out + captured.err)


def test_nothing_set_is_nothing_wrong(capsys):
    assert main(["auth", "check"]) == 0
    assert capsys.readouterr().out.count(" no ") == len(CREDENTIALS)


def test_the_vault(monkeypatch, capsys):
    asked = []

    def client(url):
        asked.append(url)
        return SimpleNamespace(get_secret=lambda name: SimpleNamespace(value=TOKEN if name.startswith("hf") else KEY))

    monkeypatch.setattr("ultravox.auth.vault.make_client", client)
    assert main(["auth", "check", "--vault", "https://example.com/v"]) == 0
    captured = capsys.readouterr()
    assert asked == ["https://example.com/v"]
    assert captured.out.count("key vault") == 4
    assert not leaks(captured.out + captured.err)
    monkeypatch.setenv("AZURE_KEY_VAULT_URL", "http://example.com/v")
    assert main(["auth", "check"]) == 2
    assert capsys.readouterr().err.startswith("ultravox: error: AZURE_KEY_VAULT_URL must be https")
