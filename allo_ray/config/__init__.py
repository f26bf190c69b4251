"""The YAML as pydantic models. Imports no torch, ray, vllm or transformers, so that it loads anywhere in no time."""
