"""The sections of language models that learn to answer: the task, its data, and causal language models."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ortho_cli.recipe.architecture import Architecture
from ortho_cli.recipe.section import Count, Positive, Rejection, Section, Share, Text, Whole

__all__ = ["CHAT", "TEMPLATES", "CausalLM", "Instruct", "Instructions", "TinyLM"]

CHAT = "chat"
# What the model is given for a query; the response follows it without a space, as it was trained to.
TEMPLATES = {
    # Stanford Alpaca's without input, which MetaMath and HRA's LLaMA experiments use.
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{query}\n\n### Response:"
    ),
    # That of PEFT's public comparison of methods.
    "question": "Question: {query} Think step by step.\nAnswer:",
    "plain": "{query}\n",
}


class Instruct(Section):
    """Responses to queries, by a causal language model: supervised fine-tuning, judged by the answers it gives."""

    kind: ClassVar[str] = "instructions"
    model_kind: ClassVar[str] = "causal language"
    name: Literal["instruct"] = Field(description="What is trained.")
    template: Text = Field(
        default="alpaca",
        description="How a query is put: alpaca, question, plain, chat (the tokenizer's own), or a text with {query}.",
    )
    max_length: Count = Field(default=512, description="Tokens of a query and its response at most; more are cut off.")
    pack: bool = Field(
        default=False,
        description="Put several samples into one row of max_length tokens, none seeing another; a batch counts rows.",
    )
    loss_on: Literal["response", "all"] = Field(
        default="response", description="Tokens that are learnt: those of the response, or of the query too."
    )
    grader: Literal["math", "exact", "none"] = Field(
        default="math",
        description="Compare final answers: by meaning (math-verify), letter by letter, or generate none at all.",
    )
    new_tokens: Count = Field(default=512, description="Tokens that an answer has at most.")
    lead_in: str = Field(default="", description="What follows the template when answers are asked for.")
    stop: tuple[Text, ...] = Field(default=(), description="Texts at which an answer ends.")
    compat: Literal["llama"] | None = Field(
        default=None,
        description="llama: also report accuracy_lenient, by the graders of HRA's LLaMA experiments, errors and all.",
    )

    def problems(self) -> Iterator[Rejection]:
        """A template that exists, or that says where the query goes."""
        if self.template not in (*TEMPLATES, CHAT) and "{query}" not in self.template:
            near = difflib.get_close_matches(self.template, [*TEMPLATES, CHAT], 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            yield (
                ("template",),
                f"{self.template!r} is none of {', '.join([*TEMPLATES, CHAT])} and has no {{query}}{hint}",
            )


class Instructions(Section):
    """Queries and responses: MetaMathQA, GSM8K, MATH, a file or hub set of one's own, or made arithmetic."""

    kind: ClassVar[str] = "instructions"
    name: Literal["metamathqa", "metamathqa-40k", "gsm8k", "math", "instruct-file", "arithmetic"] = Field(
        description="The data set; arithmetic is made and needs no download."
    )
    path: Text | None = Field(
        default=None, description="A local file (jsonl, json, csv, parquet) or folder, which wins over the hub."
    )
    source: Text | None = Field(default=None, description="A hub id other than the usual one: ORG/NAME[@revision].")
    query: Text | None = Field(default=None, description="The column of queries; null: the usual one.")
    response: Text | None = Field(default=None, description="The column of responses; null: the usual one.")
    limit: Count | None = Field(default=None, description="Take only so many training samples, the first ones.")
    max_chars: Count | None = Field(
        default=None, description="Leave out training samples of more characters, query and response together."
    )
    judge: Literal["own", "gsm8k", "math", "math-500"] = Field(
        default="own", description="What answers are judged on: this set's own test part, or another set's."
    )
    judge_path: Text | None = Field(default=None, description="A local copy of what is judged on.")
    judge_limit: Count | None = Field(default=None, description="Judge on so many samples only, drawn at random.")
    held_out: Count = Field(
        default=500, description="Samples kept from training to judge on, where a set has no test part."
    )
    operations: Annotated[tuple[Literal["plus", "minus", "times"], ...], Field(min_length=1)] = Field(
        default=("plus",), description="Of arithmetic: what is asked."
    )
    digits: Annotated[int, Field(ge=1, le=6)] = Field(default=2, description="Of arithmetic: digits of a number.")
    samples: Count = Field(default=4000, description="Of arithmetic: how many there are to train on.")
    text: Share = Field(default=0.0, description="Of arithmetic: share of the samples that is English prose instead.")
    batch: Count = Field(default=32, description="Rows a step, over all processes and accumulated parts together.")
    eval_batch: Count | None = Field(default=None, description="Rows a batch in evaluation; null: as in training.")
    workers: Whole = Field(default=0, description="Processes that load data; they do not change the result.")

    def problems(self) -> Iterator[Rejection]:
        """A file needs a place, what is made has none, and columns are those of data that has some."""
        if self.name == "instruct-file" and self.path is None and self.source is None:
            yield ("name",), "an instruct-file needs path: FILE (or source: HUB_ID)"
        if self.name == "arithmetic":
            for key in ("path", "source", "query", "response", "limit", "max_chars"):
                if getattr(self, key) is not None:
                    yield (key,), "arithmetic is made here and has none; remove the line"
        else:
            for key in sorted({"operations", "digits", "samples", "text"} & self.model_fields_set):
                if getattr(self, key) != type(self).model_fields[key].default:
                    yield (key,), f"is for arithmetic; the data is {self.name}"


class CausalLM(Architecture):
    """Any causal language model of transformers (AutoModelForCausalLM), with its tokenizer."""

    kind: ClassVar[str] = "causal language"
    is_its_base: ClassVar[bool] = True
    name: Literal["causal-lm"] = Field(description="The architecture is the base's.")
    base: Text = Field(description="A transformers folder or hub id.")
    dtype: Literal["fp32", "bf16"] = Field(
        default="fp32", description="What the weights are held in; adapters are in fp32 always."
    )
    quantize: Literal["8bit", "4bit"] | None = Field(
        default=None, description="Hold frozen weights in fewer bits, by bitsandbytes; only adapters train then."
    )


class TinyLM(Architecture):
    """A small LLaMA with random weights that reads bytes; needs no download."""

    kind: ClassVar[str] = "causal language"
    name: Literal["tiny-lm"] = Field(description="The architecture.")
    depth: Count = Field(default=2, description="Number of blocks.")
    heads: Count = Field(default=4, description="Attention heads in a block.")
    dim: Count = Field(default=64, description="Width of a token.")
    mlp_ratio: Positive = Field(default=4.0, description="Width of a block's MLP over that of a token.")
    base: Text | None = Field(
        default=None, description="Weights to start from: a run, a file, a folder or a hub id; null: random ones."
    )

    def problems(self) -> Iterator[Rejection]:
        """Heads share the width evenly, in pairs that positions turn."""
        if self.dim % (2 * self.heads):
            yield (
                ("dim",),
                f"a width of {self.dim} gives {self.heads} heads no even width; take a multiple of twice them",
            )
