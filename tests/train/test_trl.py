"""The whole step beside TRL's: its real trainer and ours on the same model, the same reference and the same pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from allo_ray.config.train import TrainConfig
from allo_ray.losses.base import LossInputs, LossOutput
from allo_ray.losses.dpo import dpo
from allo_ray.models import tiny_model
from allo_ray.train.batching import pack
from allo_ray.train.forward import Policy, load_model
from allo_ray.train.logprobs import logprobs_of
from allo_ray.train.rows import Row

#: Responses that begin alike and ones that do not, of one token and of many.
PAIRS = [
    {
        "prompt": "Question: what is 12 + 34? Answer:",
        "chosen": " 12 + 34 = 46",
        "rejected": " 12 + 34 = 45, 1",
    },
    {"prompt": "The quick brown", "chosen": " fox", "rejected": " response that appropriately completes"},
    {"prompt": "Write a", "chosen": " request. Below is an instruction", "rejected": " 0123456789"},
]


def test_a_step_of_dpo_is_trls(tiny_llama: Path, make_updater, tmp_path: Path) -> None:
    """float32, beta 0.1, another random model as the reference: every pair's loss, the loss that TRL reports for the
    batch, and the gradient it hands its optimizer, for every parameter, agree within 1e-5; the gradient also within a
    thousandth of the parameter's largest."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    other = tiny_model("llama", tmp_path / "other", seed=1)
    theirs: dict[str, torch.Tensor] = {}

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, *_, model: torch.nn.Module, **__) -> None:
            theirs.update({name: weight.grad.clone() for name, weight in model.named_parameters()})

    trainer = trl.DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32),
        args=trl.DPOConfig(
            output_dir=str(tmp_path / "trl"),
            per_device_train_batch_size=len(PAIRS),
            max_steps=1,
            beta=0.1,
            max_grad_norm=0,  # gradients as they are
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list(PAIRS),
        processing_class=AutoTokenizer.from_pretrained(tiny_llama),
        callbacks=[Gradients()],
    )
    told = list(trainer.train_dataset)
    with torch.no_grad():
        their_losses = [
            float(trainer.compute_loss(trainer.model, trainer.data_collator([row]))) for row in told
        ]
    trainer.train()

    none = np.zeros(0, dtype=np.float32)
    rows = []
    for at, row in enumerate(told):
        ids = (np.asarray(row[f"{part}_ids"], dtype=np.int32) for part in ("prompt", "chosen", "rejected"))
        rows.append(Row(at, f"row{at}", *ids, none, none, none))
    references, _ = logprobs_of(Policy(load_model(other, torch.float32)), rows, 10_000, torch.device("cpu"))
    rows = [
        Row(row.position, row.id, row.prompt, row.chosen, row.rejected, *reference, none)
        for row, reference in zip(rows, references, strict=True)
    ]
    updater = make_updater(tiny_llama, TrainConfig(lr=1e-6, dtype="float32"), dense=True)

    def loss(part: list[Row]) -> LossOutput:
        packed = pack(part, "pair")
        policy = updater.forward(packed)
        return dpo(
            LossInputs(policy, packed.reference, packed.weight, packed.sequence, packed.sequences), beta=0.1
        )

    our_losses = [float(loss([row]).sum.detach()) for row in rows]
    assert min(abs(value - np.log(2)) for value in our_losses) > 1e-3, "the reference is another model"
    assert our_losses == pytest.approx(their_losses, abs=1e-5)
    output = loss(rows)
    (output.sum / output.count).backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(np.mean(our_losses), abs=1e-5)
    ours = {name: values.grad for name, values in updater.neurons.named_values()}
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        largest = float(gradient.abs().max())
        assert largest > 1e-4, name
        furthest = float((ours[name] - gradient.reshape(-1)).abs().max())
        assert furthest < min(1e-5, 1e-3 * largest), name
