"""The tokens or labels of a model's head, which lie in ``NAME.vocab.json`` beside ``NAME.pth``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path

from utils.files import UserError, atomic_write

BLANK = "<pad>"
"""The token of CTC's blank, as transformers has it. A file that is read may also name it as in ``BLANKS``."""

BLANKS = (BLANK, "[PAD]", "<blank>", "[blank]", "<ctc_blank>")
SPACES = ("|", "\u2581", " ")
"""What stands for a space between words, or in front of a word, in the vocabularies that people have."""

SPECIAL = re.compile(r"<[^>]+>|\[[^\]]+\]")


class Vocabulary:
    """The tokens of a CTC head, or the labels of a classifier, by the number of the output.

    Args:
        tokens: the name of each output, in their order.
        tokenizer: a tokenizer of transformers with these tokens, which divides texts in its own way.
        source: where they come from, named in errors.
        blank: the number of CTC's blank; by default that of the token with one of the names in ``BLANKS``.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        tokenizer=None,
        source: str | Path = "the vocabulary",
        blank: int | None = None,
    ) -> None:
        self.tokens, self.tokenizer, self.source = list(tokens), tokenizer, source
        named = (self.tokens.index(name) for name in BLANKS if name in self.tokens)
        self.blank = next(named, None) if blank is None else blank
        if self.blank is not None:
            # Another token may have the blank's name, fairseq's <pad> say, and gets the name that this had.
            other = self.tokens[self.blank]
            self.tokens = [other if token == BLANK else token for token in self.tokens]
            self.tokens[self.blank] = BLANK

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {token: number for number, token in enumerate(self.tokens)}

    @cached_property
    def _pattern(self) -> re.Pattern:
        texts = [token for token in self.tokens if token and not SPECIAL.fullmatch(token)]
        return re.compile("|".join(re.escape(token) for token in sorted(texts, key=len, reverse=True)) + "|.")

    @cached_property
    def space(self) -> str:
        """What stands for a space; the last, a space itself, where no token has one of the others."""
        return next((s for s in SPACES if any(s in token for token in self.tokens)), SPACES[-1])

    def encode(self, text: str) -> list[int]:
        """The numbers of a text's tokens: from left to right, always the longest token that fits.

        Raises:
            UserError: the text is empty, or has characters that no token has.
        """
        words = text.split()
        if not words:
            raise UserError("its text is empty")
        if self.tokenizer is not None:
            numbers = self.tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]
            if self.tokenizer.unk_token_id in numbers:
                raise UserError(f"it has characters that are not among the tokens of {self.source}")
            return numbers
        spaced = self.space.join(words)
        pieces = self._pattern.findall(f"{self.space}{spaced}" if self.space == "\u2581" else spaced)
        unknown = sorted({piece for piece in pieces if piece not in self._numbers})
        if unknown:
            raise UserError(f"{''.join(unknown)!r:.80} is not among the tokens of {self.source}")
        return [self._numbers[piece] for piece in pieces]

    def number_of_label(self, label: str) -> list[int]:
        """The number of a label, alone in a list; raises a UserError where it is not among these."""
        if label not in self._numbers:
            raise UserError(f"the label {label!r:.80} is not among those of {self.source}")
        return [self._numbers[label]]

    def decode(self, best: Iterable[int]) -> str:
        """The text of the best token of each frame: repeated ones count once, and blanks not (CTC, Graves et
        al. 2006, section 3.1)."""
        return self.text([number for number, _ in groupby(best) if number != self.blank])

    def text(self, numbers: Sequence[int]) -> str:
        """The text that these tokens make; those like ``<s>`` are left out."""
        if self.tokenizer is not None:
            # A tokenizer made for CTC would take repeated tokens for one.
            as_they_are = {"group_tokens": False} if hasattr(self.tokenizer, "word_delimiter_token") else {}
            return self.tokenizer.decode(numbers, skip_special_tokens=True, **as_they_are)
        tokens = [self.tokens[number] for number in numbers if not SPECIAL.fullmatch(self.tokens[number])]
        return " ".join("".join(tokens).replace(self.space, " ").split())

    def of_head(self, size: int, blank: int | None = None, labels: bool = False) -> Vocabulary:
        """The tokens of a CTC head's outputs, without the special ones beyond them that tokenizers add.

        Args:
            size: outputs of the head.
            blank: the output that the head's model takes for the blank, if it has a setting for that.
            labels: whether the head is a classifier, which needs no blank.
        Raises:
            UserError: they are not this head's.
        """
        tokens, beyond = self.tokens[:size], self.tokens[size:]
        if len(self) < size or not all(map(SPECIAL.fullmatch, beyond)):
            raise UserError(
                f"{self.source} has {len(self)} tokens, and the head {size} outputs: give the vocabulary "
                "that it was trained with"
            )
        if labels:
            return Vocabulary(tokens, source=self.source)
        fitting = Vocabulary(tokens, None, self.source, self.blank if self.blank in range(size) else None)
        blank = fitting.blank if blank is None else blank
        if blank is None:
            raise UserError(f"{self.source} has no {BLANK}, CTC's blank: give the vocabulary of a CTC head")
        if blank not in range(size) or fitting.blank not in (None, blank):
            raise UserError(
                f"{self.source}: CTC's blank is its number {fitting.blank}, and the model's {blank} "
                "(pad_token_id in its config.json): correct one of the two"
            )
        return Vocabulary(tokens, None, self.source, blank)

    def write(self, path: str | Path) -> None:
        """Writes a file as transformers' ``vocab.json``: token -> number."""
        with atomic_write(path) as temporary:
            text = json.dumps({token: number for number, token in enumerate(self.tokens)}, ensure_ascii=False)
            temporary.write_text(text + "\n", encoding="utf-8")


def of_characters(texts: Iterable[str]) -> Vocabulary:
    """The characters of some texts, with ``|`` between words."""
    return Vocabulary([BLANK, "|", *sorted(set().union(*(text for text in texts)) - set(" \t|"))])


def read_vocabulary(path: str | Path) -> Vocabulary:
    """The vocabulary in a file like transformers' ``vocab.json``, or of a tokenizer's folder.

    Raises:
        UserError: there is none, or it does not give each of its tokens a number from 0 up.
    """
    path = Path(path)
    if path.is_dir():
        return _read_tokenizer(path)
    try:
        numbers = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); give a vocab.json") from error
    except (ValueError, RecursionError):
        numbers = None
    return Vocabulary(_in_order(numbers, path), source=path)


def _in_order(numbers: object, path: Path) -> list[str]:
    """The tokens of a {token: number}."""
    wanted = sorted(map(repr, range(len(numbers)))) if isinstance(numbers, dict) else None
    if wanted is None or sorted(map(repr, numbers.values())) != wanted:
        raise UserError(f"{path}: is no vocabulary, which gives each token or label a number from 0 up")
    return sorted(numbers, key=numbers.get)


def _read_tokenizer(folder: Path) -> Vocabulary:
    from utils.cli import needs_extra

    with needs_extra("convert"):
        from transformers import AutoTokenizer
        from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # It warns of types of models that it does not know.
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        numbers, blank = tokenizer.get_vocab(), tokenizer.pad_token_id
    except Exception as error:  # transformers raises many kinds.
        files = [*folder.glob("vocab*"), *folder.glob("tokenizer*")]
        reason = " ".join(str(error).split())[:300] if files else "there is none"
        raise UserError(
            f"{folder}: transformers cannot read a tokenizer of one language from it ({reason}); add its "
            "files (vocab.json, tokenizer_config.json)"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    return Vocabulary(_in_order(numbers, folder), tokenizer, folder, blank)
