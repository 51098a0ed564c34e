"""The errors that users see: one clear line that says what was expected, what came and what to change.

The command line prints them as ``ultravox: error: …`` and exits with code 2; no traceback. Only the mistakes of one
configuration are several lines, since all of them are found at once.
"""


class UltravoxError(Exception):
    """Base of every error caused by what the user gave: a file, a config, a name, a full disk."""


class ConfigError(UltravoxError):
    """A run configuration that cannot be read or does not make sense: its mistakes, a line each."""

    def __init__(self, *mistakes: str) -> None:
        super().__init__("\n  ".join(mistakes))
        self.mistakes = mistakes


class AudioError(UltravoxError):
    """An audio file that is missing, broken, empty, too long or not audio."""


class DataError(UltravoxError):
    """A dataset, manifest or batch whose parts do not fit together."""


class ModelError(UltravoxError):
    """A model that cannot be found, fetched, converted or combined."""


class CheckpointError(UltravoxError):
    """A checkpoint that is missing, damaged or belongs to another run."""


class NetworkError(UltravoxError):
    """Something that must be fetched once, and could not be."""
