"""Prompts and pairs: sources, templates, tokenisation, verifiers, pairing, rewrites, and the rows that train."""
