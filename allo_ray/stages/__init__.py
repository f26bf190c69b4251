"""One short file a stage: it reads tables and models from its inputs and writes tables and models."""
