"""Tokens and keys of other services: where they are looked for, and a type that never shows them."""
