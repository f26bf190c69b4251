"""Low-redundant alignment of language models (ALLO, arXiv 2406.12606) on Ray."""

__version__ = "0.1.0"
