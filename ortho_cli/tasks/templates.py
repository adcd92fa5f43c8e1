"""A query and its response as the text that a model reads, and where in it the response begins."""

from __future__ import annotations

from typing import Any

from ortho_cli.errors import RecipeError
from ortho_cli.recipe.instruct import CHAT, TEMPLATES

__all__ = ["prompt_text", "response_text"]


def prompt_text(template: str, query: str, tokenizer: Any = None) -> str:
    r"""What a model is given before it answers.

    Args:
        template: a name of `TEMPLATES`, `chat`, or a text with ``{query}``; nothing else in it is replaced.
        query: of the user; an empty one is plain text to go on with, and has no prompt.
        tokenizer: whose chat template `chat` means.

    Raises:
        RecipeError: `chat`, and the tokenizer has no template.

    >>> prompt_text("plain", "1 + 1?"), prompt_text("Q: {query} A:", "{1} + 1?"), prompt_text("alpaca", "")
    ('1 + 1?\n', 'Q: {1} + 1? A:', '')
    """
    if not query:
        return ""
    if template != CHAT:
        return TEMPLATES.get(template, template).replace("{query}", query)
    return _chat(tokenizer, [{"role": "user", "content": query}], add_generation_prompt=True)


def response_text(template: str, query: str, response: str, tokenizer: Any = None) -> str:
    """What a model should answer, to be put behind `prompt_text` as it is; the end-of-sequence token is not in it.

    Raises:
        RecipeError: `chat`, and the tokenizer's template puts an answer elsewhere than behind its prompt.

    >>> response_text("plain", "1 + 1?", "2")
    '2'
    """
    if template != CHAT or not query:
        return response
    prompt = prompt_text(template, query, tokenizer)
    turns = [{"role": "user", "content": query}, {"role": "assistant", "content": response}]
    whole = _chat(tokenizer, turns)
    if not whole.startswith(prompt):
        raise RecipeError(
            "the tokenizer's chat template does not put an answer behind its prompt, so it cannot be told apart",
            hint="give task.template as a text with {query}",
        )
    return whole[len(prompt) :].rstrip("\n")


def _chat(tokenizer: Any, turns: list[dict[str, str]], **options: Any) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise RecipeError(
            "task.template is chat, and the tokenizer of model.base has no chat template",
            hint=f"one of {', '.join(TEMPLATES)}, or a text with {{query}}",
        )
    return str(tokenizer.apply_chat_template(turns, tokenize=False, **options))
