"""Subword tokenizers trained on a run's own documents, and documents cut into passages.

Axes: N passages, T tokens of a passage.
"""

import json
import os
import pathlib
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32
from tokenizers import Encoding, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from hfedmoe_jax.errors import InputError
from hfedmoe_jax.ranges import check_bytes
from hfedmoe_jax.registry import unknown_name

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]")
PAD_ID, UNK_ID, CLS_ID = range(3)
# Byte-level BPE starts from all 256 bytes.
MINIMUM_VOCAB_SIZE = {"wordpiece": 64, "bpe": 256 + len(SPECIAL_TOKENS)}
CHECKPOINT = "checkpoint"
LONG_TEXT = ("split", "truncate")
# The trainers' time grows with the square of a word's length, so they see longer ones in pieces.
LONGEST_WORD = 1000
# Accents and other marks on letters of any script that BERT strips. The marks of Devanagari, Thai, Arabic and
# others have blocks of their own: they are vowels, and stay.
ACCENTS = r"[\x{300}-\x{36f}\x{1ab0}-\x{1aff}\x{1dc0}-\x{1dff}\x{20d0}-\x{20ff}\x{fe20}-\x{fe2f}]"
ENCODE_BATCH = 4096
LONG_WORD = re.compile(rf"(?<!\S)\S{{{LONGEST_WORD + 1},}}")


def train_tokenizer(texts: Sequence[str], kind: str, vocab_size: int) -> Tokenizer:
    """Trains a tokenizer whose vocabulary depends on nothing but the arguments.

    The special tokens are [PAD]=0, [UNK]=1 and [CLS]=2; a text that spells one of them out does not
    become one. `wordpiece` lower-cases and strips accents as BERT does (Devlin et al., 2019), but keeps the
    marks that are vowels, as of Devanagari and Thai; a word of more than 100 characters is [UNK] to it.
    `bpe` works on bytes, so it knows every text (Radford et al., 2019).

    Args:
      texts: the training documents.
      kind: `wordpiece` or `bpe`.
      vocab_size: the largest vocabulary allowed; a small corpus yields a smaller one.

    Raises:
      InputError: an unknown kind or a vocabulary too small for it.
    """
    check_tokenizer(kind, vocab_size)
    texts = [LONG_WORD.sub(_in_pieces, text) for text in texts]
    return (_train_wordpiece if kind == "wordpiece" else _train_bpe)(texts, vocab_size)


def load_tokenizer(directory: str | os.PathLike) -> Tokenizer:
    """Returns the tokenizer of a checkpoint; a text that spells a special token out does not become one.

    Args:
      directory: with the file tokenizer.json.

    Raises:
      InputError: there is none, or it cannot be read.
    """
    path = pathlib.Path(directory) / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        problem = "cannot be read" if path.exists() else "is missing"
        raise InputError(
            "model.source", str(path), problem, "name a directory with a tokenizer.json"
        ) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer


def token_offset(tokenizer: Tokenizer) -> int:
    """Returns what is added to token numbers, so that 0 is padding: nothing if it is the tokenizer's own."""
    return 0 if "pad" in (tokenizer.id_to_token(PAD_ID) or "").lower() else 1


class Specials(NamedTuple):
    """Token numbers in batches: those put around a text, and the one for what the tokenizer does not know."""

    opening: tuple[int, ...]
    closing: tuple[int, ...]
    unknown: int | None


def specials_of(tokenizer: Tokenizer) -> Specials:
    """Returns the special tokens; those of this module open a text with [CLS]."""
    encoding, offset = tokenizer.encode("a", add_special_tokens=True), token_offset(tokenizer)
    mask, ids = encoding.special_tokens_mask, [number + offset for number in encoding.ids]
    unknown = next(filter(None, map(tokenizer.token_to_id, ("[UNK]", "<unk>"))), None)
    unknown = None if unknown is None else unknown + offset
    if not any(mask):
        opening = tokenizer.token_to_id(SPECIAL_TOKENS[CLS_ID])
        return Specials(() if opening is None else (opening + offset,), (), unknown)
    text = mask.index(0)
    after = len(mask) - mask[::-1].index(0)
    return Specials(tuple(ids[:text]), tuple(ids[after:]), unknown)


def check_tokenizer(kind: str, vocab_size: int) -> None:
    """Raises InputError if no tokenizer of that kind and size can be had."""
    if kind == CHECKPOINT:
        return
    if kind not in MINIMUM_VOCAB_SIZE:
        raise unknown_name("data.tokenizer", kind, [*MINIMUM_VOCAB_SIZE, CHECKPOINT])
    if vocab_size < MINIMUM_VOCAB_SIZE[kind]:
        raise InputError(
            "data.vocab_size",
            vocab_size,
            f"too small for a {kind} tokenizer",
            f"use at least {MINIMUM_VOCAB_SIZE[kind]}, e.g. 8192",
        )


def encode_passages(
    tokenizer: Tokenizer, texts: Sequence[str], seq_len: int, long_text: str
) -> tuple[Int32[np.ndarray, "N T"], Int32[np.ndarray, " N"]]:
    """Encodes texts as passages of `seq_len` tokens, filled up with [PAD].

    Each is opened by [CLS], or has around it what the tokenizer of a checkpoint puts there.
    `split` cuts a text into consecutive windows of the other tokens; a last window shorter than a
    quarter of that is dropped unless it is the only one. `truncate` keeps the first window.
    Every text, even an empty one, has at least one passage.

    Args:
      tokenizer: of `train_tokenizer` or `load_tokenizer`.
      texts: the documents.
      seq_len: T, at least 2.
      long_text: `split` or `truncate`.

    Returns:
      The passages in the order of their documents, and the index in `texts` of each one's document.

    Raises:
      InputError: `seq_len` below 2 or an unknown `long_text`.
    """
    check_passages(seq_len, long_text)
    (opening, closing, _), offset = specials_of(tokenizer), token_offset(tokenizer)
    window = seq_len - len(opening) - len(closing)
    if window < 1:
        least = seq_len - window + 1
        raise InputError(
            "data.seq_len", seq_len, "must hold the special tokens and one more", f"use at least {least}"
        )
    passages, document = [], []
    for index, ids in enumerate(_encode(tokenizer, texts)):
        for start in range(0, _kept_windows(len(ids), window, long_text) * window, window):
            passages.append(ids[start : start + window])
            document.append(index)
    what = f"{len(passages):,} passages of that length are"
    # Another of the size says where tokens are.
    check_bytes("data.seq_len", seq_len, what, 5.0 * len(passages) * seq_len, "use fewer tokens a passage")
    lengths = np.fromiter(map(len, passages), np.int32, len(passages))
    tokens = np.full((len(passages), seq_len), PAD_ID, np.int32)
    tokens[:, : len(opening)] = opening
    is_filled = np.arange(window) < lengths[:, None]
    inside = tokens[:, len(opening) : len(opening) + window]
    inside[is_filled] = np.fromiter(chain.from_iterable(passages), np.int32, lengths.sum())
    inside[is_filled] += offset
    for place, token in enumerate(closing):
        tokens[np.arange(len(tokens)), len(opening) + lengths + place] = token
    return tokens, np.array(document, np.int32)


def check_passages(seq_len: int, long_text: str) -> None:
    """Raises InputError if texts cannot be cut into such passages."""
    if seq_len < 2:
        raise InputError("data.seq_len", seq_len, "must hold [CLS] and one token", "use at least 2, e.g. 64")
    if long_text not in LONG_TEXT:
        raise unknown_name("data.long_text", long_text, list(LONG_TEXT))


def to_json(tokenizer: Tokenizer) -> str:
    """Returns the text of a `tokenizer.json`, which the Hugging Face libraries read as well."""
    return tokenizer.to_str()


def from_json(text: str) -> Tokenizer:
    """Returns the tokenizer of a `tokenizer.json` text."""
    return Tokenizer.from_str(text)


def _in_pieces(word: re.Match[str]) -> str:
    return " ".join(word[0][start : start + LONGEST_WORD] for start in range(0, len(word[0]), LONGEST_WORD))


def encodings(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[Encoding]:
    """Yields each text's tokens with their places in the text, without special tokens."""
    yield from _by_batch(tokenizer.encode_batch, texts)


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[list[int]]:
    # The fast way leaves the places out.
    for encoding in _by_batch(tokenizer.encode_batch_fast, texts):
        yield encoding.ids


def _by_batch(encode: Callable[..., list[Encoding]], texts: Sequence[str]) -> Iterator[Encoding]:
    for start in range(0, len(texts), ENCODE_BATCH):
        yield from encode(list(texts[start : start + ENCODE_BATCH]), add_special_tokens=False)


def _kept_windows(length: int, window: int, long_text: str) -> int:
    whole, rest = divmod(length, window)
    if long_text == "truncate":
        return 1
    return max(1, whole + (rest > 0 and 4 * rest >= window))


def _train_wordpiece(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token=SPECIAL_TOKENS[UNK_ID]))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.BertNormalizer(lowercase=False, strip_accents=False),
            normalizers.NFD(),
            normalizers.Replace(Regex(ACCENTS), ""),
            normalizers.NFC(),
            normalizers.Lowercase(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    initial, continuing = _alphabets(tokenizer, texts, (vocab_size - len(SPECIAL_TOKENS)) // 2)
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        # The trainer numbers continuing characters in the random order of a hash table and breaks ties
        # by number; naming them all beforehand takes the chance out.
        special_tokens=[*SPECIAL_TOKENS, *(f"##{character}" for character in continuing)],
        initial_alphabet=initial,
        limit_alphabet=len(initial),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _without_added_tokens(tokenizer)


def _alphabets(tokenizer: Tokenizer, texts: Sequence[str], limit: int) -> tuple[list[str], list[str]]:
    """Returns the most frequent characters, and those of them that continue a word, both sorted."""
    counts, words = Counter(), set()
    for text in texts:
        text = tokenizer.normalizer.normalize_str(text)
        counts.update(text)
        words.update(text.split())
    characters = [character for character in counts if not character.isspace()]
    kept = set(sorted(characters, key=lambda character: (-counts[character], character))[:limit])
    continuing = {character for word in words for character in word[1:]} - set(string.punctuation)
    return sorted(kept), sorted(kept & continuing)


def _train_bpe(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _without_added_tokens(tokenizer)


def _without_added_tokens(tokenizer: Tokenizer) -> Tokenizer:
    # An added token matches in raw text: a document that quotes "[PAD]" would hold padding.
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = []
    return Tokenizer.from_str(json.dumps(content, ensure_ascii=False))
