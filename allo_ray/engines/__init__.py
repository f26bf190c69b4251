"""Inference engines: vLLM and transformers behind one interface. Only this package imports vllm."""
