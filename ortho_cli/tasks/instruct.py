"""Responses to queries by a causal language model: trained on the response's tokens, judged by the answers it gives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import exp
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ortho_cli import registry

from .answer_items import Item, ItemLog
from .answers import final_answer, plain, same_answer
from .batching import shuffled
from .generation import bare_model, greedy_answers
from .image_specs import Split
from .instruct_data import Pairs, load_pairs
from .lenient_answers import lenient_gsm8k, lenient_math
from .task import Batch, Losses, Reduce, Task
from .templates import prompt_text
from .token_rows import IGNORED, TokenRows, encode

if TYPE_CHECKING:
    from ortho_cli.recipe.instruct import Instruct, Instructions

__all__ = ["InstructTask"]

OVERFLOW = 700.0  # a mean loss above it has no perplexity in floating point


class InstructTask(Task):
    """Train a language model to respond, and judge it by its answers.

    The loss is a mean over all learnt tokens of the whole batch, whatever the number of processes and of accumulated
    parts: each batch brings the number its sum is divided by. `accuracy` is the share of judged queries whose final
    answer means the right one; `answered` the share with any answer.

    Args:
        task: template, lengths, and how answers are made and graded.
        data: the pairs that train, and those that judge.
        seed: of the run.
    """

    metrics = ("loss", "perplexity", "accuracy", "accuracy_lenient", "answered_share")

    def __init__(self, task: Instruct, data: Instructions, *, seed: int) -> None:
        super().__init__(task, data, seed=seed)
        self.config: Instruct = task
        self.data: Instructions = data
        self.log = ItemLog()
        self._model: Any = None
        self._pairs: dict[Split, Pairs] = {}
        self._splits: dict[Split, TokenRows] = {}

    def build_model(self, config: Any) -> nn.Module:
        """The model of a recipe's `model` section; its tokenizer is the task's from then on."""
        model: nn.Module = registry.resolve("models", config.name)(config)
        self._model = self._model or model
        return model

    def pairs(self, split: Split) -> Pairs:
        """The queries and responses of a split, opened when they are first asked for."""
        if split not in self._pairs:
            self._pairs[split] = load_pairs(self.data, split)
        return self._pairs[split]

    def dataset(self, split: Split) -> TokenRows:
        """A split as rows of tokens; `eval` is never packed, so that a row is a query."""
        if split not in self._splits:
            if self._model is None:
                raise ValueError("the model, whose tokenizer is needed, is built before data is read")
            config, tokenizer = self.config, self._model.tokenizer
            samples = encode(
                self.pairs(split), tokenizer, config.template, config.max_length, learn_all=config.loss_on == "all"
            )
            row = config.max_length if config.pack and split == "train" else None
            self._splits[split] = TokenRows(samples, tokenizer.pad_token_id, row, indexed=split == "eval")
        return self._splits[split]

    def size(self, split: Split) -> int:
        """Rows in a split; nothing is tokenized to count them, unless several samples share one."""
        return len(self.dataset(split)) if self.config.pack and split == "train" else len(self.pairs(split))

    def example(self, batch: int) -> Batch:
        """Rows of the greatest length."""
        ids = torch.zeros(batch, self.config.max_length, dtype=torch.long)
        packed = {"position_ids": torch.arange(self.config.max_length).expand_as(ids)} if self.config.pack else {}
        return {"input_ids": ids, "labels": ids.clone(), **packed, "scale": torch.tensor(1.0 / ids.numel())}

    def batches(
        self, split: Split, epoch: int, *, batch: int, rank: int = 0, world: int = 1, skip: int = 0, workers: int = 0
    ) -> Iterator[Batch]:
        """As `Task.batches`; training batches carry `scale`, which makes sums of losses into means over the step."""
        found = super().batches(split, epoch, batch=batch, rank=rank, world=world, skip=skip, workers=workers)
        return self._scaled(iter(found), epoch, batch, world, skip) if split == "train" else iter(found)

    def _scaled(self, batches: Iterator[Batch], epoch: int, batch: int, world: int, skip: int) -> Iterator[Batch]:
        """The loop weighs the parts of a step, and the processes, alike; of tokens each has its own number."""
        rows = self.dataset("train")
        learnt = rows.learnt[shuffled(len(rows), self.seed, epoch)]
        parts = self.data.batch // batch
        for number, found in enumerate(batches, start=skip):
            first = number // parts * self.data.batch
            tokens = int(learnt[first : first + self.data.batch].sum())
            yield {**found, "scale": torch.tensor(parts * world / max(tokens, 1))}

    def loss(self, model: nn.Module, batch: Batch, phase: str) -> Losses:
        """Cross-entropy of the learnt tokens: this part's share of the mean over all those of the step."""
        logits = model(batch["input_ids"], batch.get("position_ids"))
        return _loss_sum(logits, batch["labels"]) * batch["scale"], logits, {}

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[Batch], reduce: Reduce | None = None) -> dict[str, float]:
        """Loss a token, perplexity, and the share of right answers, where answers are asked for.

        Answers in the log are not made again. Sums are added up over processes and divided once.
        """
        was_training = model.training
        model.eval()
        if self.log.path is None:  # of an earlier state of the model
            self.log = ItemLog()
        log, asks = self.log, self.config.grader != "none"
        if isinstance(model, DistributedDataParallel):
            model = model.module  # a process may have fewer rows than another, and then none to wait for
        sums = torch.zeros(6, dtype=torch.float64, device=next(model.parameters()).device)
        for batch in batches:
            if not len(batch["input_ids"]):
                continue
            labels = batch["labels"]
            sums[0] += _loss_sum(model(batch["input_ids"], batch.get("position_ids")), labels).double()
            sums[1] += (labels[:, 1:] != IGNORED).sum()
            if not asks or "index" not in batch:  # training samples are judged by their loss alone
                continue
            places = batch["index"].tolist()
            queries = self.pairs("eval").queries  # what the log answers may have been changed since
            missing = [each for each in places if each not in log.items or log.items[each].query != queries[each]]
            log.add(self._items(missing, bare_model(model)))
            items = [log.items[place] for place in places]
            for item in items:
                marks = item.correct, bool(item.lenient), item.answer is not None, True
                sums[2:] += torch.tensor(marks, device=sums.device)
        model.train(was_training)
        loss, tokens, right, lenient, answered, count = (sums if reduce is None else reduce(sums)).tolist()
        self._gather()
        mean = loss / max(tokens, 1)
        metrics = {"loss": mean, "perplexity": exp(min(mean, OVERFLOW))}
        if count:
            metrics["accuracy"] = right / count
            if self.config.compat == "llama":
                metrics["accuracy_lenient"] = lenient / count
            metrics["answered_share"] = answered / count
        return metrics

    def log_items(self, path: Path) -> None:
        """Keep every answer of the coming evaluation in a file, and do not make those again that are in it."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        self.log = ItemLog(path if rank == 0 else path.with_suffix(f".{rank}{path.suffix}"))

    def _gather(self) -> None:
        """Give every process all items."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            parts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, self.log.items)
            self.log.items = {index: item for part in parts for index, item in part.items()}

    def answer(self, model: Any, queries: Sequence[str]) -> list[str]:
        """What a model writes in response to queries, all in one batch."""
        config = self.config
        return greedy_answers(
            model, [self.prompt(query) for query in queries], new_tokens=config.new_tokens, stop=config.stop,
            special=config.template != "chat",
        )  # fmt: skip

    def prompt(self, query: str) -> str:
        """What the model is given to answer a query."""
        return prompt_text(self.config.template, query, self._model.tokenizer) + self.config.lead_in

    def _items(self, places: list[int], model: Any) -> list[Item]:
        pairs = self.pairs("eval")
        responses = self.answer(model, [pairs.queries[place] for place in places])
        return [
            self.graded(place, pairs.queries[place], pairs.responses[place], response)
            for place, response in zip(places, responses, strict=True)
        ]

    def graded(self, index: int, query: str, solution: str, response: str) -> Item:
        """Grade a response against the data's, of which only the final answer counts; without one, all of it does."""
        gold = final_answer(solution) or plain(solution)
        answer = final_answer(response)
        if answer is None and final_answer(solution) is None:
            answer = plain(response) or None
        right = same_answer(gold, answer) if self.config.grader == "math" else gold == answer
        lenient = None
        if self.config.compat == "llama":
            lenient = (lenient_gsm8k if "####" in solution else lenient_math)(response, solution)
        return Item(index, query, gold, response, answer, right, lenient)


def _loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of the learnt tokens' losses: each is predicted from those before it."""
    ahead, wanted = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(ahead.float(), wanted, ignore_index=IGNORED, reduction="sum")
