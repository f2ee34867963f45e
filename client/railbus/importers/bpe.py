"""Text by a byte-level BPE tokenizer that is trained on it.

The vocabulary stands in the column's `labels`, in the order of its numbers, and the column's `encoding` is `bpe`. That
is the whole tokenizer: a token's merge is the pair that the tokens before it make of it, so `tokenizer_of` builds it
again from the schema, and no further file is needed beside the dataset.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from railbus.importers.characters import Pieces, pieces_of
from railbus.importers.source import Array, Chunk, Options, Outline
from railbus.importers.token_blocks import blocks, num_blocks
from railbus_shared.contracts.artifacts import Column, Dtype
from railbus_shared.errors import ConfigError, InvalidField, SchemaInvalid

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ENCODING: Final = "bpe"
_MAX_VOCAB: Final = 65_536
_NUM_BYTES: Final = 256
_TRAINING_CHARACTERS: Final = 256 << 20
"""More text makes no better tokens, and the words of it must be held in memory."""
_PIECE_TOKENS: Final = 1 << 20


class BpeText:
    """Blocks of trained tokens; column `tokens`, uint16 (block + 1,)."""

    def __init__(self, path: Path, options: Options) -> None:
        """Trains, then encodes the file into the scratch folder. Raises InvalidField, ConfigError."""
        if not _NUM_BYTES < options.vocab_size <= _MAX_VOCAB:
            raise InvalidField(
                field="vocab_size",
                value=options.vocab_size,
                problem="a vocabulary has the 256 bytes, and up to 65536 tokens in all",
            )
        block = options.block
        num_blocks(path.stat().st_size * _NUM_BYTES, block=block, kind="tokens")  # a bad block is told before training
        training = pieces_of(path, report=options.report, stage="training")
        known = options.vocabulary
        tokenizer = tokenizer_of(known) if known else trained(training(), vocab_size=options.vocab_size)
        labels = [tokenizer.id_to_token(number) or "" for number in range(tokenizer.get_vocab_size())]
        dtype: Dtype = "uint16"
        self._tokens = options.scratch / "tokens"
        self._dtype = np.dtype(dtype)
        self._block = block
        count = self._encode(tokenizer, pieces_of(path, report=options.report, stage="encoding"))
        column = Column(
            dtype=dtype,
            shape=(block + 1,),
            encoding=ENCODING,
            description=f"Tokens of a byte-level BPE; the first {block} predict the last {block}.",
            num_classes=len(labels),
            labels=tuple(labels),
        )
        self.outline = Outline(
            columns={"tokens": column},
            samples=num_blocks(count, block=block, kind="tokens"),
            held_out="validation",
            is_sequence=True,
            sample_bytes=(block + 1) * self._dtype.itemsize,
        )

    def _encode(self, tokenizer: Tokenizer, pieces: Pieces) -> int:
        """Write the tokens to scratch and count them."""
        count = 0
        with self._tokens.open("wb") as file:
            for lines in _line_groups(pieces()):
                for found in tokenizer.encode_batch(lines):
                    file.write(np.array(found.ids, self._dtype).tobytes())
                    count += len(found.ids)
        return count

    def chunks(self) -> Iterator[Chunk]:
        return blocks(self._pieces(), block=self._block)

    def _pieces(self) -> Iterator[Array]:
        with self._tokens.open("rb") as file:
            while data := file.read(_PIECE_TOKENS * self._dtype.itemsize):
                yield np.frombuffer(data, self._dtype)


def trained(pieces: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """A tokenizer trained on the text, or on as much of its start as helps."""
    tokenizer = _empty({}, [])
    from tokenizers import pre_tokenizers, trainers  # noqa: PLC0415 - an extra

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
    )
    tokenizer.train_from_iterator(_some(pieces), trainer)
    return tokenizer


def tokenizer_of(labels: Sequence[str]) -> Tokenizer:
    """The tokenizer of a column of tokens, built from its labels; raises SchemaInvalid if they are no BPE."""
    vocabulary = {label: number for number, label in enumerate(labels)}
    merges = [_merge(label, number, vocabulary) for number, label in enumerate(labels) if len(label) > 1]
    return _empty(vocabulary, merges)


def _merge(label: str, number: int, vocabulary: dict[str, int]) -> tuple[str, str]:
    """The pair that becomes this token: what the tokens before it make of its characters."""
    parts = list(label)
    while len(parts) > 2:
        pairs = [vocabulary.get(left + right, number) for left, right in itertools.pairwise(parts)]
        at = min(range(len(pairs)), key=pairs.__getitem__)
        if pairs[at] >= number:
            raise SchemaInvalid(
                f"field 'labels' holds {label!r}, which no tokens before it make", hint="import the text again"
            )
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _empty(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415 - an extra
    except ImportError as exc:
        raise ConfigError(
            "a trained tokenizer needs the package tokenizers", hint="pip install 'railbus[text]'"
        ) from exc
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _some(pieces: Iterable[str]) -> Iterator[str]:
    """Lines of the text up to a limit."""
    left = _TRAINING_CHARACTERS
    for group in _line_groups(pieces):
        yield from group
        left -= sum(map(len, group))
        if left <= 0:
            return


def _line_groups(pieces: Iterable[str]) -> Iterator[Sequence[str]]:
    """The text cut after newlines into parts that may be encoded one by one; a very long line is cut anywhere."""
    rest = ""
    for piece in pieces:
        *whole, rest = (rest + piece).splitlines(keepends=True) or [""]
        if not rest.endswith("\n") and len(rest) < len(piece):
            yield whole
        else:
            yield [*whole, rest]
            rest = ""
    if rest:
        yield [rest]
