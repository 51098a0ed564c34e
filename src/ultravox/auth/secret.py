"""A text that nobody sees by accident."""

from collections.abc import Iterable
from typing import Any, NoReturn, SupportsIndex

REDACTED = "[redacted]"


class Secret:
    """A token, key or password. Printed, formatted, logged or in an error, it reads `[redacted]`.

    Only `reveal` gives the value. JSON, a copy and serialisation of any kind are refused, so that no file, checkpoint
    or other process gets it unasked.
    """

    __slots__ = ("__value",)

    def __init__(self, value: str) -> None:
        self.__value = value

    def reveal(self) -> str:
        """The value itself, for the library that needs it."""
        return self.__value

    def __repr__(self) -> str:
        return REDACTED

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return REDACTED

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError("a Secret is not written down or copied: reveal() it where it is used")

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(self, "_Secret__value"):
            raise AttributeError("a Secret does not change")
        super().__setattr__(name, value)


def redact(text: str, secrets: Iterable[Secret]) -> str:
    """A text of someone else's (an error of a library) without the secrets in it."""
    for secret in secrets:
        text = text.replace(secret.reveal(), REDACTED)
    return text
