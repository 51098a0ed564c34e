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
    rows = []
    for credential in CREDENTIALS:
        one = found.get(credential.variable)
        valid = None if one is None else is_valid(credential.variable, one)
        source = None if one is None else one.source
        rows.append({"name": credential.variable, "set": one is not None, "valid": valid, "source": source})
    if args.json:
        print(json.dumps({"version": FORMAT_VERSION, "credentials": rows}))
    else:
        from ultravox.cli.names import print_table

        words = {True: "yes", False: "no", None: "-"}
        table = [(str(row["name"]), words[row["set"]], words[row["valid"]], row["source"] or "-") for row in rows]
        print_table(("name", "set", "valid in form", "from"), table)
    return 2 if any(row["valid"] is False for row in rows) else 0
