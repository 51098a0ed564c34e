"""Azure Key Vault, with whatever identity this machine or user has (extra ``azure``)."""

from typing import Any, Protocol
from urllib.parse import urlsplit

from ultravox.auth.secret import Secret
from ultravox.errors import ConfigError, NetworkError

URL_VARIABLE = "AZURE_KEY_VAULT_URL"


class SecretClient(Protocol):
    """What is used of `azure.keyvault.secrets.SecretClient`."""

    def get_secret(self, name: str) -> Any:
        """An object with `value`. azure's ResourceNotFoundError when the vault has none of that name."""
        ...


def make_client(url: str) -> SecretClient:
    """A client that signs in by `DefaultAzureCredential`: environment, workload or managed identity, `az login`, …

    Raises:
        ConfigError: the extra is not installed.
    """
    try:
        from azure.identity import DefaultAzureCredential
        from azure.keyvault.secrets import SecretClient as AzureSecretClient
    except ImportError as error:
        raise ConfigError(
            f"the key vault {url} needs packages that are not installed: pip install 'ultravox[azure]', or unset "
            f"{URL_VARIABLE}"
        ) from error
    return AzureSecretClient(url, DefaultAzureCredential())


class KeyVault:
    """One vault."""

    def __init__(self, url: str, client: SecretClient | None = None) -> None:
        """Args:
        url: `https://<name>.vault.azure.net`, or of another Azure cloud.
        client: in the place of Azure's own, such as one that answers from memory in a test; None = `make_client`.

        Raises:
            ConfigError: the URL is none of a vault, or the extra is not installed.
        """
        parts = urlsplit(url)
        if parts.scheme != "https" or not parts.hostname or parts.username or parts.password:
            raise ConfigError(f"{URL_VARIABLE} must be https://<name of the vault>.vault.azure.net; see docs/auth.md")
        self.url = url
        self._client = make_client(url) if client is None else client

    def get(self, name: str) -> Secret | None:
        """The newest version of a secret, None when there is none. NetworkError when the vault cannot be asked."""
        from azure.core.exceptions import AzureError, ResourceNotFoundError

        try:
            value = self._client.get_secret(name).value
        except ResourceNotFoundError:
            return None
        except AzureError as error:  # its text is long, and says what was tried with which account
            raise NetworkError(
                f"the key vault {self.url} did not give {name!r} ({type(error).__name__}): sign in (az login) with an "
                f"identity that may read its secrets, or unset {URL_VARIABLE}; ULTRAVOX_TRACEBACK=1 shows all of it"
            ) from error
        return Secret(value) if value else None
