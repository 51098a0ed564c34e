"""``ultravox auth check``: which tokens and keys are set, and where; never the values."""

import argparse

HELP = (
    "Show which tokens and keys of Hugging Face, Weights & Biases and ClearML are set, whether they look right, and "
    "where they come from; never the values. Exit code 2 when one that is set does not look right."
)
FORMAT_VERSION = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--vault and --json."""
    parser.add_argument("--vault", metavar="URL", help="Azure Key Vault to ask, in place of AZURE_KEY_VAULT_URL")
    parser.add_argument("--json", action="store_true", help="one JSON object (format version 1)")


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    import json

    from ultravox.auth.credentials import CREDENTIALS, find_credentials, is_valid
    from ultravox.auth.vault import KeyVault

    found = find_credentials(vault=KeyVault(args.vault) if args.vault else None)
    valid = {variable: is_valid(variable, one) for variable, one in found.items()}
    names = [credential.variable for credential in CREDENTIALS]
    sources = {variable: one.source for variable, one in found.items()}
    if args.json:
        rows = [
            {"name": name, "set": name in found, "valid": valid.get(name), "source": sources.get(name)}
            for name in names
        ]
        print(json.dumps({"version": FORMAT_VERSION, "credentials": rows}))
    else:
        from ultravox.cli.names import print_table

        words = {True: "yes", False: "no"}
        table = [
            (name, words[name in found], words[valid[name]] if name in valid else "-", sources.get(name, "-"))
            for name in names
        ]
        print_table(("name", "set", "valid in form", "from"), table)
    return 0 if all(valid.values()) else 2
