"""Secrets are never shown; where credentials are found, and that a wrong one is told without being quoted."""

import copy
import json
import logging
import os
import pickle
from types import SimpleNamespace

import pytest

from ultravox.auth.credentials import (
    CREDENTIALS,
    Found,
    exported,
    find_credentials,
    in_environment,
    is_valid,
    of_services,
    read_dotenv,
)
from ultravox.auth.secret import REDACTED, Secret, redact
from ultravox.auth.vault import KeyVault
from ultravox.errors import ConfigError, NetworkError, UltravoxError

CANARY = "hf_canaryCanaryCanaryCanaryCanary0123"


class FakeVault:
    """In the place of Azure's client."""

    def __init__(self, secrets: dict[str, str], error: Exception | None = None) -> None:
        self.secrets, self.error, self.asked = secrets, error, []

    def get_secret(self, name: str) -> SimpleNamespace:
        from azure.core.exceptions import ResourceNotFoundError

        self.asked.append(name)
        if self.error is not None:
            raise self.error
        if name not in self.secrets:
            raise ResourceNotFoundError(f"{name} is not there")
        return SimpleNamespace(value=self.secrets[name])


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """No login of this machine's user, and an environment without credentials."""
    for credential in CREDENTIALS:
        monkeypatch.delenv(credential.variable, raising=False)
    for name in ("HF_HOME", "HF_TOKEN_PATH", "XDG_CACHE_HOME", "NETRC", "WANDB_BASE_URL", "AZURE_KEY_VAULT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


# The type


def test_a_secret_shows_itself_nowhere(caplog):
    secret = Secret(CANARY)
    texts = [repr(secret), str(secret), f"{secret}", f"{secret!r:>60}", str([secret]), str({"a": secret})]
    with caplog.at_level(logging.INFO):
        logging.getLogger("x").info("token %s", secret)
    assert CANARY not in " ".join(texts) + caplog.text
    assert REDACTED in caplog.text
    assert secret.reveal() == CANARY
    assert CANARY not in repr(Found(secret, "environment"))


@pytest.mark.parametrize("writer", [pickle.dumps, json.dumps, copy.copy, copy.deepcopy])
def test_a_secret_is_not_written_or_copied(writer):
    with pytest.raises(TypeError) as error:
        writer(Secret(CANARY))
    assert CANARY not in str(error.value)


def test_a_secret_has_no_open_attribute_and_does_not_change():
    secret = Secret(CANARY)
    assert not hasattr(secret, "__dict__")
    assert not hasattr(secret, "value")
    with pytest.raises(AttributeError):
        secret.value = "other"
    with pytest.raises(AttributeError):
        secret._Secret__value = "other"


def test_a_secret_in_a_text_of_others_is_taken_out():
    assert redact(f"401 for {CANARY}.", [Secret(CANARY)]) == f"401 for {REDACTED}."


# Where they are found


def test_the_first_place_wins(nowhere):
    vault = FakeVault({"hf-access-token": "hf_of_the_vault"})
    (nowhere / "token").write_text("hf_of_the_login\n")
    places = {"HF_TOKEN_PATH": str(nowhere / "token")}

    def hf(environment, **kwargs):
        found = find_credentials(of_services("huggingface"), environment=environment, **kwargs)
        return {name: (one.secret.reveal(), one.source) for name, one in found.items()}

    (nowhere / ".env").write_text("HF_TOKEN=hf_of_the_file\n")
    assert hf({"HF_TOKEN": "hf_env", **places}) == {"HF_TOKEN": ("hf_env", "environment")}
    assert hf(places) == {"HF_TOKEN": ("hf_of_the_file", ".env")}
    (nowhere / ".env").unlink()
    assert hf(places) == {"HF_TOKEN": ("hf_of_the_login", "Hugging Face's token file")}
    client = KeyVault("https://example.com/v", vault)
    assert hf(places, vault=client) == {"HF_TOKEN": ("hf_of_the_login", "Hugging Face's token file")}
    assert vault.asked == []
    (nowhere / "token").unlink()
    assert hf({"HF_TOKEN": "", **places}, vault=client) == {"HF_TOKEN": ("hf_of_the_vault", "key vault")}
    assert hf(places) == {}


def test_the_vault_has_names_of_its_own_and_no_address(nowhere):
    names = ("hf-access-token", "wandb-api-key", "clearml-api-access-key", "clearml-api-secret-key")
    vault = FakeVault({name: f"value of {name}" for name in names})
    found = find_credentials(vault=KeyVault("https://example.com/v", vault))
    assert [one.secret.reveal() for one in found.values()] == [f"value of {name}" for name in names]
    assert list(found) == [c.variable for c in CREDENTIALS if c.variable != "CLEARML_API_HOST"]
    assert vault.asked == list(names)


@pytest.mark.parametrize("place", ["environment", ".env"])
def test_the_vault_is_named_in_the_environment_or_the_file(nowhere, monkeypatch, place):
    asked = []
    monkeypatch.setattr("ultravox.auth.vault.make_client", lambda url: asked.append(url) or FakeVault({}))
    if place == "environment":
        monkeypatch.setenv("AZURE_KEY_VAULT_URL", "https://example.com/v")
    else:
        (nowhere / ".env").write_text("AZURE_KEY_VAULT_URL=https://example.com/v\n")
    assert find_credentials() == {}
    assert asked == ["https://example.com/v"]


def test_a_vault_that_cannot_be_asked_is_an_error_without_azures_text(nowhere):
    from azure.core.exceptions import ClientAuthenticationError

    vault = KeyVault("https://example.com/v", FakeVault({}, ClientAuthenticationError(f"tried with {CANARY}")))
    with pytest.raises(NetworkError, match=r"example\.com/v did not give 'hf-access-token'.*az login") as error:
        find_credentials(vault=vault)
    assert CANARY not in str(error.value)


@pytest.mark.parametrize(
    "url", ["http://example.com/v", "example.com/v", "https://", "https://" + "user:x@example.com"]
)
def test_a_vault_has_an_https_url(url):
    with pytest.raises(ConfigError, match="AZURE_KEY_VAULT_URL must be https"):
        KeyVault(url, FakeVault({}))


def test_a_vault_without_the_extra_names_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "azure.keyvault.secrets", None)
    with pytest.raises(ConfigError, match=r"pip install 'ultravox\[azure\]'"):
        KeyVault("https://example.com/v")


def test_the_dotenv_file_is_taken_as_it_stands(nowhere):
    path = nowhere / ".env"
    path.write_text('# keys\nexport HF_TOKEN="a$HOME#b"\nEMPTY=\nNOTHING\nWANDB_API_KEY=x  # of ann\n')
    assert read_dotenv(path) == {"HF_TOKEN": "a$HOME#b", "EMPTY": "", "WANDB_API_KEY": "x"}
    path.write_bytes(b"HF_TOKEN=\xff\xfe")
    with pytest.raises(UltravoxError, match=r"\.env cannot be read as a text"):
        find_credentials()


def test_netrc_of_wandbs_host(nowhere):
    path = nowhere / ".netrc"
    path.write_text(f"machine api.wandb.ai login user password {'a' * 40}\nmachine localhost login u password b\n")
    path.chmod(0o600)
    found = find_credentials(of_services("wandb"))["WANDB_API_KEY"]
    assert (found.secret.reveal(), found.source) == ("a" * 40, "netrc")
    other = find_credentials(of_services("wandb"), environment={"WANDB_BASE_URL": "https://localhost/x"})
    assert other["WANDB_API_KEY"].secret.reveal() == "b"
    path.write_text(f"machine api.wandb.ai {CANARY}")
    with pytest.raises(UltravoxError, match="no netrc file") as error:
        find_credentials(of_services("wandb"))
    assert CANARY not in str(error.value)


@pytest.mark.parametrize(
    ("variable", "value", "valid"),
    [
        ("HF_TOKEN", CANARY, True),
        ("HF_TOKEN", "api_org_" + "a" * 30, True),
        ("HF_TOKEN", CANARY + " ", False),
        ("HF_TOKEN", CANARY[:12], False),
        ("HF_TOKEN", "a" * 40, False),
        ("WANDB_API_KEY", "a" * 40, True),
        ("WANDB_API_KEY", "local-" + "a" * 40, True),
        ("WANDB_API_KEY", "wandb_v1_" + "a" * 77, True),
        ("WANDB_API_KEY", "a" * 39, False),
        ("WANDB_API_KEY", "a" * 40 + "\n", False),
        ("CLEARML_API_ACCESS_KEY", "ABCDEFGHIJ0123456789", True),
        ("CLEARML_API_ACCESS_KEY", "ABC", False),
        ("CLEARML_API_SECRET_KEY", "a" * 50, True),
        ("CLEARML_API_SECRET_KEY", "a" * 20, False),
        ("CLEARML_API_HOST", "https://example.com:8008", True),
        ("CLEARML_API_HOST", "example.com", False),
    ],
)
def test_the_form_of_a_value(variable, value, valid):
    assert is_valid(variable, Found(Secret(value), "environment")) is valid


def test_wandb_itself_agrees_on_the_form():
    validation = pytest.importorskip("wandb.sdk.lib.wbauth.validation")
    for value in ("a" * 40, "local-" + "a" * 40, "a" * 39, "a.b.c", "wandb_v1_" + "a" * 77, "a" * 30 + "!" * 20):
        assert is_valid("WANDB_API_KEY", Found(Secret(value), "")) is (validation.check_api_key(value) is None), value


def test_what_is_exported_is_put_back(nowhere, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "before")
    found = {"HF_TOKEN": Found(Secret(CANARY), ".env"), "WANDB_API_KEY": Found(Secret("inside"), ".env")}
    with exported(found):
        assert (os.environ["HF_TOKEN"], os.environ["WANDB_API_KEY"]) == (CANARY, "inside")
    with pytest.raises(KeyError), exported(found):
        raise KeyError
    assert "HF_TOKEN" not in os.environ
    assert os.environ["WANDB_API_KEY"] == "before"
    with in_environment({"WANDB_API_KEY": None}):
        assert "WANDB_API_KEY" not in os.environ
    assert os.environ["WANDB_API_KEY"] == "before"
