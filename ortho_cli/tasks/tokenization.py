"""Words into pieces and back: byte-pair encoding, learnt from the training text.

Byte-level BPE: any text can be encoded, and decoding gives it back as it was, so that nothing is unknown and a score is
of the text itself. The pieces are a function of the text and of their number alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ortho_cli.errors import CheckpointError, RecipeError, UsageError

__all__ = ["END", "PADDING", "Pieces"]

PADDING, END = 0, 1
SPECIAL = ("<pad>", "</s>")
LEAST_COUNT = 2  # a pair of pieces that is seen once teaches nothing


class Pieces:
    """The vocabulary of a language.

    Args:
        tokenizer: of the library `tokenizers`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        tokenizer.encode_special_tokens = True  # "</s>" in a text is text

    @classmethod
    def learn(cls, sentences: Iterable[str], size: int) -> Pieces:
        """Learn pieces from sentences.

        Args:
            sentences: to train on, and no others.
            size: pieces, padding and end included.

        Raises:
            RecipeError: the text does not have as many.
            UsageError: `tokenizers` is not installed.

        Reference: Sennrich et al. 2015, arXiv:1508.07909.

        >>> pieces = Pieces.learn(["low lower lowest", "new newer newest"] * 2, 268)
        >>> pieces.decode(pieces.encode(["lowest Öl"])[0])
        'lowest Öl'
        """
        tokenizers = _library()
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=size, min_frequency=LEAST_COUNT, special_tokens=list(SPECIAL), show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
        tokenizer.train_from_iterator(sentences, trainer)
        made = tokenizer.get_vocab_size()
        if made != size:
            raise RecipeError(
                f"the training text has {made} pieces, expected {size}", hint=f"--set data.vocabulary={made}, or less"
            )
        return cls(tokenizer)

    @classmethod
    def load(cls, file: Path) -> Pieces:
        """Read what `save` wrote.

        Raises:
            CheckpointError: it is not there, or damaged.
            UsageError: `tokenizers` is not installed.
        """
        try:
            return cls(_library().Tokenizer.from_str(file.read_text("utf-8")))
        except UsageError:
            raise
        except Exception as error:  # the library raises Exception itself
            raise CheckpointError(f"no vocabulary can be read: {error}", where=str(file)) from error

    def save(self, file: Path) -> None:
        """Write the vocabulary as `tokenizers` and transformers read it."""
        file.write_text(self.tokenizer.to_str(pretty=True), "utf-8")

    def encode(self, sentences: Sequence[str]) -> list[list[int]]:
        """Sentences as pieces, each with `END` at its end."""
        found = self.tokenizer.encode_batch_fast(list(sentences), add_special_tokens=False)
        return [[*each.ids, END] for each in found]

    def decode(self, pieces: Sequence[int]) -> str:
        """Pieces, up to the first `END`, as text; padding is nothing."""
        pieces = list(pieces)
        kept = pieces[: pieces.index(END)] if END in pieces else pieces
        text: str = self.tokenizer.decode(kept, skip_special_tokens=True)
        return text


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise UsageError("vocabularies need the library tokenizers", hint="pip install 'ortho-cli[text]'") from error
    return tokenizers
