"""What is worth telling about the data of a run: labels, copies, and what the tokenizer cannot read.

Axes: N passages, T tokens.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int32
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from hfedmoe_jax.data.columns import Corpus, Documents, ordered_names
from hfedmoe_jax.data.splits import Splits
from hfedmoe_jax.data.tokenizers import CHECKPOINT, encodings, specials_of, token_offset
from hfedmoe_jax.errors import InputError

UNKNOWN_WARNED, UNKNOWN_REFUSED = 0.05, 0.5


@dataclass(frozen=True)
class Facts:
    """Facts about the documents of all splits together, unless it says otherwise.

    Attributes:
      label_counts: documents by label, in the order of the labels.
      alike_labels: labels that differ in case, spaces or Unicode form only, group by group.
      copies: documents whose text came before.
      disputed: texts that have more than one label.
      left_out: documents left out so that no text is in two splits, by the reason.
      moved: texts drawn for another split that train, because a label or an owner had no other.
      owners: owners of the training documents; 0 where none are known.
      unknown_share: share of the characters of the training texts, spaces aside, in words read as [UNK].
      notes: of the source.
    """

    label_counts: dict[str, int]
    alike_labels: tuple[tuple[str, ...], ...] = ()
    copies: int = 0
    disputed: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    moved: int = 0
    owners: int = 0
    unknown_share: float = 0.0
    notes: tuple[str, ...] = ()


def facts_of(corpus: Corpus, splits: Splits, unknown: float) -> Facts:
    """Returns the facts of a corpus and its splits; `unknown` is of `unknown_share`."""
    parts = (splits.train, splits.validation, splits.test)
    pairs = [pair for part in parts for pair in zip(_whole_texts(part), part.labels, strict=True)]
    counts = Counter(label for _, label in pairs)
    labels_a_text = Counter(text for text, _ in set(pairs))
    return Facts(
        label_counts={name: counts[name] for name in ordered_names(counts)},
        alike_labels=alike(counts),
        copies=len(pairs) - len(labels_a_text),
        disputed=sum(count > 1 for count in labels_a_text.values()),
        left_out=splits.left_out,
        moved=splits.moved,
        owners=len(set(splits.train.clients or ())),
        unknown_share=unknown,
        notes=corpus.notes,
    )


def _whole_texts(part: Documents) -> list[str]:
    """Returns the texts, of questions with their choices."""
    if part.choices is None:
        return part.texts
    return ["\n".join((text, *each)) for text, each in zip(part.texts, part.choices, strict=True)]


def alike(names: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """Returns groups of names that differ in case, spaces or Unicode form only.

    >>> alike(["pos", "neg", "Pos "])
    (('Pos ', 'pos'),)
    """
    groups: dict[str, list[str]] = {}
    for name in sorted(set(names)):
        plain = unicodedata.normalize("NFKC", name).casefold()
        groups.setdefault(" ".join(plain.split()), []).append(name)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def unknown_share(tokenizer: Tokenizer, texts: Sequence[str], tokens: Int32[np.ndarray, "N T"]) -> float:
    """Returns the share of the characters of texts, spaces aside, that are in words read as [UNK].

    Characters and not tokens, because a whole text of a script without spaces may be one [UNK].

    Args:
      tokens: of the texts; if none is [UNK], the texts are not read again.
    """
    special = specials_of(tokenizer).unknown
    if special is None or not np.any(tokens == special):
        return 0.0
    unknown, lost = special - token_offset(tokenizer), 0
    for text, encoding in zip(texts, encodings(tokenizer, texts), strict=True):
        ids = encoding.ids
        if unknown in ids:
            places = zip(ids, encoding.offsets, strict=True)
            lost += sum(
                num_characters(text[start:end]) for number, (start, end) in places if number == unknown
            )
    return lost / max(1, sum(map(num_characters, texts)))


def num_characters(text: str) -> int:
    """Returns the length of a text without its spaces.

    >>> num_characters("a bc ")
    3
    """
    return sum(map(len, text.split()))


def check_unknown(share: float, data_config: ConfigDict) -> None:
    """Raises InputError if most of the training texts is [UNK] to the tokenizer."""
    if share > UNKNOWN_REFUSED:
        raise InputError(
            "data.tokenizer",
            data_config.tokenizer,
            f"cannot read {share:.0%} of the training texts: so many of their characters are in words that "
            "become [UNK]",
            "use a checkpoint that reads this script"
            if data_config.tokenizer == CHECKPOINT
            else "use data.tokenizer=bpe, which reads every script",
        )
