"""``python -m ultravox`` is the ``ultravox`` command."""

from ultravox.cli.main import entry

if __name__ == "__main__":
    entry()
