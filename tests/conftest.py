"""Fixtures shared by all tests: one Ray cluster a session, and tiny random models with a real tokenizer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from allo_ray.session import quiet

quiet()  # before anything imports what reads these variables
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama with tied embeddings."""
    from allo_ray.models import tiny_model

    return tiny_model("llama", tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Qwen2 with untied embeddings and biases."""
    from allo_ray.models import tiny_model

    return tiny_model("qwen", tmp_path_factory.mktemp("tiny") / "qwen")


@pytest.fixture(scope="session")
def tiny_bytes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Qwen2 whose tokenizer knows no merges: one token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from allo_ray.models import tiny_model

    folder = tiny_model("qwen", tmp_path_factory.mktemp("tiny") / "bytes")
    alphabet = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    letters = Tokenizer(models.BPE({letter: at for at, letter in enumerate(alphabet)}, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local cluster for the whole session; more logical CPUs than cores, or tasks wait for each other for ever."""
    import ray

    from allo_ray.session import start_local

    start_local(num_cpus=6, ignore_reinit_error=True)
    yield
    ray.shutdown()
