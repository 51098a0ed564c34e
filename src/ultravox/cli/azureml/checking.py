"""What `render` and `submit` ask of a job file."""

from pathlib import Path

from ultravox.errors import ConfigError


def require_valid(path: Path, shown: Path | None = None) -> str:
    """Check a job file by our own rules and, where it is installed, by Azure's SDK.

    Args:
        path: of the file; its paths begin in its folder.
        shown: its name in messages, where that is another one.

    Returns: who has checked, in words.

    Raises:
        ConfigError: all that is wrong, a line each.
    """
    from ultravox.clusters import azureml_checks, azureml_client
    from ultravox.clusters.azureml_job import read_job

    mistakes = azureml_checks.find_mistakes(read_job(path), path.parent)
    if not azureml_client.is_installed():
        who = "ultravox alone (azure-ai-ml is not installed: pip install 'ultravox[azure]')"
    else:
        who = "ultravox and azure-ai-ml"
        if not mistakes:  # the SDK says the same things in more words
            mistakes = azureml_client.find_sdk_mistakes(path)
    if mistakes:
        raise ConfigError(*(f"{shown or path}: {mistake}" for mistake in mistakes))
    return who
