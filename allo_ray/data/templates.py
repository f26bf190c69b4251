"""How a raw question becomes the text that the model reads."""

from __future__ import annotations

from typing import Any

from allo_ray.errors import UserError

#: The paper's prompt for downstream tasks (Table 6, second row), in the line layout of Alpaca.
PAPER = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response: Let's think step by step."
)

#: The paper's prompt for the teacher and the reward model (Table 6, first row).
REWRITE = (
    "Given the problem and the correct solution, you need to correct the mistakes in the prediction to get the "
    'correct answer. You should write down the correct prediction and use "The answer is: " (without quotation '
    "mark) to identify the final answer. You should make minimal modifications. You should not copy the problem.\n\n"
    "### Problem:\n{problem}\n\n### Correct solution:\n{solution}\n\n### Prediction:\n{prediction}\n\n"
    "### Correct prediction:\n"
)

Messages = list[dict[str, str]]


def render(template: str, prompt: str | Messages, tokenizer: Any = None) -> str:
    """Returns the text that the model reads.

    Args:
        template: "plain" (the prompt itself), "paper", "chat" (the tokenizer's chat template), or a text with
            {prompt}; other braces in it stay as they are.
        prompt: a question, or a conversation of {role, content} turns (template "chat" or "plain" only; "plain"
            joins the turns' contents by line breaks).
        tokenizer: a transformers tokenizer; needed by "chat".

    Raises:
        UserError: the template is unknown, or the tokenizer has no chat template.
    """
    if template == "chat":
        return _chat(prompt, tokenizer)
    if not isinstance(prompt, str):
        prompt = "\n".join(turn["content"] for turn in prompt)
    if template == "plain":
        return prompt
    if template == "paper":
        template = PAPER
    if "{prompt}" not in template:
        raise UserError(
            f"data.template: {template!r} is unknown; use plain, paper, chat, or a text with {{prompt}}"
        )
    return template.replace("{prompt}", prompt)


def _chat(prompt: str | Messages, tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "data.template: the model's tokenizer has no chat template; use plain, paper or a text"
        )
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def rewrite_context(problem: str, solution: str, prediction: str) -> str:
    """Returns what teacher and reward model read before the correction (p_i, x_i, y+_i and y-_i of Eq. 5)."""
    return REWRITE.format(problem=problem.strip(), solution=solution.strip(), prediction=prediction.strip())
