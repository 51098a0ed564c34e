"""``ultravox auth``: the tokens and keys of other services."""
