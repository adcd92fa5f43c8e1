"""What recipes say of translation: the task, its pairs of sentences, and its models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ortho_cli.recipe.architecture import Architecture
from ortho_cli.recipe.section import Count, Rejection, Section, Share, Text, Whole

__all__ = ["ROWS", "Parallel", "TransformerBase", "TransformerSmall", "Translate"]

ROWS = 8  # sentences that a batch has, or a multiple of it: what processes can share evenly
KIND, MODEL_KIND = "pairs of sentences", "translation"


class Translate(Section):
    """Sentences into another language, by cross-entropy; judged by BLEU of what beam search finds."""

    kind: ClassVar[str] = KIND
    model_kind: ClassVar[str] = MODEL_KIND
    name: Literal["translate"] = Field(description="What is trained.")
    label_smoothing: Share = Field(default=0.1, description="Probability that is spread over the whole vocabulary.")
    beam: Count = Field(default=5, description="Translations that beam search keeps; 1 is greedy.")
    length_penalty: float = Field(
        default=1.0, description="A translation's log-probability is divided by its length to this power."
    )
    max_length: Count = Field(default=200, description="Pieces of a translation at most, its end included.")
    samples: Count = Field(default=16, description="Translations that are shown, of the same sentences every time.")
    compat: Literal["tokenized-bleu"] | None = Field(
        default=None,
        description="tokenized-bleu: BLEU of lower-cased words between spaces, as the paper has it; it is comparable "
        "only where the text was tokenised alike.",
    )


class Parallel(Section):
    """Sentences in two languages: a known set, two text files a part, or the messages of installed packages."""

    kind: ClassVar[str] = KIND
    batch_unit: ClassVar[str] = "pieces"
    """What `batch` counts, where it is not samples."""
    name: Literal["iwslt14-de-en", "wmt14-de-en", "parallel-text", "catalogues"] = Field(
        description="The set; catalogues are messages of Python packages and need no other download."
    )
    path: Text | None = Field(
        default=None,
        description="A folder with train.LANGUAGE, valid.LANGUAGE and test.LANGUAGE, a sentence a line; it wins over "
        "the hub.",
    )
    source: Text | None = Field(
        default=None, description="A hub id other than the usual one, ORG/NAME[@revision], with a column `translation`."
    )
    languages: tuple[Text, Text] = Field(default=("de", "en"), description="From which language into which.")
    packages: Annotated[tuple[Text, ...], Field(min_length=1)] = Field(
        default=("django",), description="Of catalogues: the packages, as they are imported; one side is English."
    )
    vocabulary: Annotated[int, Field(ge=258)] = Field(
        default=10_000,
        description="Pieces of words of each language (byte-pair encoding), with 256 bytes, padding and end.",
    )
    joint: bool = Field(default=False, description="One vocabulary for both languages instead of one each.")
    max_length: Count = Field(
        default=175, description="Pieces of a sentence to train on at most; longer ones are left out."
    )
    judge: Literal["val", "test"] = Field(
        default="test", description="The part that evaluation is on: val to choose settings by, test to report."
    )
    batch: Count = Field(
        default=4000, description="Pieces a step at most, padding included, over all processes and parts together."
    )
    eval_batch: Count | None = Field(default=None, description="Pieces a batch in evaluation; null: as in training.")
    workers: Whole = Field(default=0, description="Processes that load data; they do not change the result.")

    def problems(self) -> Iterator[Rejection]:
        """Where the sentences come from, two languages, and batches that hold the longest."""
        if self.name == "catalogues":
            for key in ("path", "source"):
                if getattr(self, key) is not None:
                    yield (key,), "catalogues come with packages and have none; remove the line, or see packages"
            if "en" not in self.languages:
                yield ("languages",), "messages are translated from English: one of the two languages is en"
        elif self.name == "parallel-text" and self.path is None and self.source is None:
            yield ("name",), "a parallel-text needs path: FOLDER (or source: HUB_ID)"
        if self.languages[0] == self.languages[1]:
            yield ("languages",), f"both are {self.languages[0]}"
        if self.batch < ROWS * self.max_length:
            reason = f"a batch of {self.batch} pieces does not hold {ROWS} sentences of {self.max_length}; raise batch"
            yield ("max_length",), f"{reason}, or take {self.batch // ROWS} here"


class _Transformer(Architecture):
    """What both sizes have."""

    kind: ClassVar[str] = MODEL_KIND
    name: str
    dim: Annotated[Count, Field(description="Width of a token.")]
    hidden: Annotated[Count, Field(description="Width of the feed-forward layers.")]
    heads: Annotated[Count, Field(description="Attention heads.")]
    depth: Annotated[Count, Field(description="Blocks of the encoder, and of the decoder.")]
    positions: Count = Field(default=1024, description="Pieces of a sentence at most.")
    dropout: Share = Field(default=0.2, description="Share dropped of embeddings and of what blocks add.")
    activation_dropout: Share = Field(default=0.1, description="Share dropped behind the feed-forward layers' ReLU.")
    base: Text | None = Field(
        default=None, description="Weights to start from: a run, a file, a folder or a hub id; null: random ones."
    )

    def problems(self) -> Iterator[Rejection]:
        """Heads share the width evenly."""
        if self.dim % self.heads:
            yield ("dim",), f"a width of {self.dim} cannot be shared by {self.heads} heads; take a multiple of heads"


class TransformerSmall(_Transformer):
    """The translation model of FNL, 11.9 million parameters with two vocabularies of 10,000."""

    name: Literal["transformer-small"] = Field(description="The architecture.")
    dim: Annotated[Count, Field(description="Width of a token.")] = 256
    hidden: Annotated[Count, Field(description="Width of the feed-forward layers.")] = 1024
    heads: Annotated[Count, Field(description="Attention heads.")] = 4
    depth: Annotated[Count, Field(description="Blocks of the encoder, and of the decoder.")] = 2


class TransformerBase(_Transformer):
    """The base size of arXiv:1706.03762, with norms before what they norm and without biases."""

    name: Literal["transformer-base"] = Field(description="The architecture.")
    dim: Annotated[Count, Field(description="Width of a token.")] = 512
    hidden: Annotated[Count, Field(description="Width of the feed-forward layers.")] = 2048
    heads: Annotated[Count, Field(description="Attention heads.")] = 8
    depth: Annotated[Count, Field(description="Blocks of the encoder, and of the decoder.")] = 6
