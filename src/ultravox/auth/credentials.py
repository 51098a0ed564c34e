"""Which tokens and keys are used, what each looks like, and where it is found: the first place that has it wins.

1. the environment; 2. a file `.env` in the working directory; 3. the file that the service's own login writes;
4. Azure Key Vault, where `AZURE_KEY_VAULT_URL` names one.
"""

import netrc
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from ultravox.auth.secret import Secret
from ultravox.auth.vault import URL_VARIABLE, KeyVault
from ultravox.errors import UltravoxError

Service = Literal["huggingface", "wandb", "clearml"]
WANDB_HOST = "api.wandb.ai"


@dataclass(frozen=True, slots=True)
class Credential:
    """One token, key or address that a library reads from the environment."""

    variable: str
    service: Service
    form: re.Pattern[str]
    """Of the whole value. It tells a truncated or mixed-up value, not whether the service accepts it."""
    vault_name: str | None = None
    own_file: Callable[[Mapping[str, str]], "Found | None"] | None = None
    """Looks into the file of the service's own login."""


@dataclass(frozen=True, slots=True)
class Found:
    """A credential that is set, and where."""

    secret: Secret
    source: str
    """In words, for a reader: "environment", ".env", a file's name, "key vault"."""


def _huggingface_file(environment: Mapping[str, str]) -> Found | None:
    """What `hf auth login` has written."""
    home = environment.get("HF_HOME") or Path(environment.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    path = Path(environment.get("HF_TOKEN_PATH") or Path(home) / "token").expanduser()
    value = _read(path).strip() if path.is_file() else ""
    return Found(Secret(value), "Hugging Face's token file") if value else None


def _wandb_netrc(environment: Mapping[str, str]) -> Found | None:
    """What `wandb login` has written."""
    host = urlsplit(environment.get("WANDB_BASE_URL", "")).hostname or WANDB_HOST
    named = environment.get("NETRC")
    paths = [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]
    for path in paths:
        if not path.expanduser().is_file():
            continue
        try:
            login = netrc.netrc(path.expanduser()).authenticators(host)
        except netrc.NetrcParseError as error:  # its text may quote a password
            raise UltravoxError(f"{path}, line {error.lineno}: this is no netrc file; mend or remove it") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UltravoxError(f"{path} cannot be read as a netrc file; mend or remove it") from error
        return Found(Secret(login[2]), "netrc") if login and login[2] else None
    return None


CREDENTIALS = (
    # hf_…, hf_oauth_… of users, api_org_… of organisations, hf_jwt_… with dots
    Credential(
        "HF_TOKEN", "huggingface", re.compile(r"(hf|api_org)_[\w.-]{20,}"), "hf-access-token", _huggingface_file
    ),
    # 40 characters or more, behind a prefix on servers of one's own; or a JWT
    Credential(
        "WANDB_API_KEY",
        "wandb",
        re.compile(r"([A-Za-z0-9]+-)?[\w-]{40,}|[\w-]+\.[\w-]+\.[\w-]+"),
        "wandb-api-key",
        _wandb_netrc,
    ),
    Credential("CLEARML_API_ACCESS_KEY", "clearml", re.compile(r"[\w-]{16,}"), "clearml-api-access-key"),
    Credential("CLEARML_API_SECRET_KEY", "clearml", re.compile(r"[\w-]{32,}"), "clearml-api-secret-key"),
    Credential("CLEARML_API_HOST", "clearml", re.compile(r"https?://[^\s/@]+(/\S*)?")),
)


def find_credentials(
    wanted: Iterable[Credential] = CREDENTIALS,
    *,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    vault: KeyVault | None = None,
) -> dict[str, Found]:
    """Variable → where it is set, of those that are.

    Args:
        wanted: what to look for.
        environment: None = this process's.
        folder: with the file `.env`; None = the working directory.
        vault: asked last; None = that of `AZURE_KEY_VAULT_URL`, if it is set.

    Raises:
        UltravoxError: a file that is there cannot be read, or the vault cannot be asked.
    """
    environment = os.environ if environment is None else environment
    from_file = read_dotenv((folder or Path.cwd()) / ".env")
    found: dict[str, Found] = {}
    missing: list[Credential] = []
    for credential in wanted:
        if value := environment.get(credential.variable, ""):
            found[credential.variable] = Found(Secret(value), "environment")
        elif value := from_file.get(credential.variable, ""):
            found[credential.variable] = Found(Secret(value), ".env")
        elif credential.own_file is not None and (own := credential.own_file({**from_file, **environment})):
            found[credential.variable] = own
        elif credential.vault_name is not None:
            missing.append(credential)
    url = environment.get(URL_VARIABLE) or from_file.get(URL_VARIABLE)
    if missing and vault is None and url:
        vault = KeyVault(url)
    for credential in missing if vault is not None else ():
        assert vault is not None
        assert credential.vault_name is not None
        if (secret := vault.get(credential.vault_name)) is not None:
            found[credential.variable] = Found(secret, "key vault")
    return found


def is_valid(variable: str, found: Found) -> bool:
    """Whether a value has the form that its service's have."""
    form = next(credential.form for credential in CREDENTIALS if credential.variable == variable)
    return form.fullmatch(found.secret.reveal()) is not None


def of_services(*services: Service) -> list[Credential]:
    """What these services need."""
    return [credential for credential in CREDENTIALS if credential.service in services]


@contextmanager
def exported(found: Mapping[str, Found]) -> Iterator[None]:
    """Have the credentials in this process's environment, where the libraries look, while the block runs."""
    with in_environment({variable: one.secret.reveal() for variable, one in found.items()}):
        yield


@contextmanager
def in_environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """Set variables of this process's environment, None = unset, while the block runs; put back what was there."""
    environment: MutableMapping[str, str] = os.environ
    before = {variable: environment.get(variable) for variable in values}
    _put(environment, values)
    try:
        yield
    finally:
        _put(environment, before)


def _put(environment: MutableMapping[str, str], values: Mapping[str, str | None]) -> None:
    for variable, value in values.items():
        if value is None:
            environment.pop(variable, None)
        else:
            environment[variable] = value


def read_dotenv(path: Path) -> dict[str, str]:
    """The variables of a `.env` file, taken as they stand; none when there is no file. UltravoxError: unreadable."""
    if not path.is_file():
        return {}
    from io import StringIO

    from dotenv import dotenv_values

    values = dotenv_values(stream=StringIO(_read(path)), interpolate=False)
    return {name: value for name, value in values.items() if value is not None}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UltravoxError(f"{path} cannot be read as a text; mend its permissions or remove it") from error
