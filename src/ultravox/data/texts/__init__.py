"""Texts for synthetic speech: word lists, templates, and what draws from them."""
