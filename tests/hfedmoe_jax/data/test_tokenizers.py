import os
import random
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfedmoe_jax.data import encode_passages, from_json, to_json, train_tokenizer
from hfedmoe_jax.errors import InputError

PAD, UNK, CLS = 0, 1, 2
TEXTS = [
    "Lower lowest slower slowest, newer newest wider widest.",
    "Lower prices, newer phones; wider roads (and slower cars).",
    "Crème brûlée costs £5; naïve Äpfel 日本 日本語 ευρώ € 100.",
    "",
] * 2
TOKENIZERS = {kind: train_tokenizer(TEXTS, kind, 320) for kind in ("wordpiece", "bpe")}

any_text = st.text(max_size=60) | st.sampled_from(TEXTS)
kinds = st.sampled_from(sorted(TOKENIZERS))


def ids_of(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
def test_special_tokens_and_size(kind):
    tokenizer = TOKENIZERS[kind]
    assert [tokenizer.token_to_id(token) for token in ("[PAD]", "[UNK]", "[CLS]")] == [PAD, UNK, CLS]
    assert 64 < tokenizer.get_vocab_size() <= 320
    assert sorted(tokenizer.get_vocab().values()) == list(range(tokenizer.get_vocab_size()))


@pytest.mark.parametrize("kind, size", [("wordpiece", 64), ("bpe", 259)])
def test_the_vocabulary_never_exceeds_what_was_asked(kind, size):
    texts = ["".join(map(chr, range(start, start + 40))) for start in range(0x400, 0x600, 40)]
    assert train_tokenizer(texts, kind, size).get_vocab_size() <= size
    assert train_tokenizer([""], kind, size).get_vocab_size() <= size


def test_wordpiece_reads_as_bert_does():
    tokenizer = TOKENIZERS["wordpiece"]
    assert ids_of(tokenizer, "LOWER Crème") == ids_of(tokenizer, "lower creme")
    assert UNK not in ids_of(tokenizer, "wider lowest £5")
    assert ids_of(tokenizer, "Ж") == [UNK]
    # Punctuation always stands alone, so it needs no place as the end of a word.
    assert not {f"##{mark}" for mark in ".,;()"} & set(tokenizer.get_vocab())


@pytest.mark.parametrize(
    "one, other",
    [("की", "का"), ("ที", "ทา"), ("ที่", "ที้"), ("كَ", "كِ"), ("が", "か")],
)
def test_wordpiece_keeps_marks_that_make_another_word(one, other):
    tokenizer = train_tokenizer([f"{one} {other}"] * 3, "wordpiece", 300)
    assert UNK not in ids_of(tokenizer, f"{one} {other}")
    assert ids_of(tokenizer, one) != ids_of(tokenizer, other)


def test_wordpiece_reads_both_unicode_forms_of_a_syllable():
    tokenizer = train_tokenizer(["한국어"] * 3, "wordpiece", 300)
    decomposed = unicodedata.normalize("NFD", "한국어")
    assert ids_of(tokenizer, decomposed) == ids_of(tokenizer, "한국어") != [UNK]


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
def test_a_huge_word_is_learned_in_pieces(kind):
    word = "".join(random.Random(0).choices("abcdefghij", k=3500))
    pieces = " ".join(word[start : start + 1000] for start in range(0, 3500, 1000))
    trained = [to_json(train_tokenizer([text, "ab cd"], kind, 320)) for text in (word, pieces)]
    assert trained[0] == trained[1]


@settings(deadline=None)
@given(any_text)
def test_bpe_knows_every_text(text):
    tokenizer = TOKENIZERS["bpe"]
    assert tokenizer.decode(ids_of(tokenizer, text)) == text


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
def test_a_text_cannot_spell_a_special_token(kind):
    text = "[CLS] lower [PAD] [UNK]"
    tokenizer = train_tokenizer([*TEXTS, text, text], kind, 320)
    tokens, _ = encode_passages(tokenizer, [text], 64, "split")
    assert (tokens == CLS).sum() == 1
    assert UNK not in ids_of(tokenizer, text) and PAD not in ids_of(tokenizer, text)


def test_training_depends_on_nothing_but_the_texts():
    # Many equally frequent pairs and characters: whatever breaks ties shows.
    program = (
        "import random; from hfedmoe_jax.data.tokenizers import *\n"
        "chance = random.Random(0)\n"
        "letters = [chr(c) for c in (*range(97, 123), *range(0x3b1, 0x3ca), *range(0x430, 0x450))]\n"
        "words = [''.join(chance.choices(letters, k=4)) for _ in range(300)]\n"
        "for kind, size in (('wordpiece', 64), ('wordpiece', 400), ('bpe', 400)):\n"
        "    print(to_json(train_tokenizer([' '.join(words)] * 2, kind, size)))"
    )
    outputs = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONIOENCODING": "utf-8"}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, check=True
        )
        outputs.add(done.stdout)
    assert len(outputs) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_neither_warns_nor_hangs():
    program = (
        "import os; from hfedmoe_jax.data.tokenizers import *\n"
        "tokenizer = train_tokenizer(['a b c'] * 5000, 'bpe', 300)\n"
        "encode = lambda: encode_passages(tokenizer, ['a b'] * 5000, 8, 'split')\n"
        "encode()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    encode()\n"
        "    os._exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], env=environment, capture_output=True, timeout=180
    )
    assert done.returncode == 0 and b"parallelism" not in done.stderr


@settings(deadline=None)
@given(kinds, any_text)
def test_json_round_trip(kind, text):
    tokenizer = from_json(to_json(TOKENIZERS[kind]))
    assert tokenizer.get_vocab() == TOKENIZERS[kind].get_vocab()
    assert ids_of(tokenizer, text) == ids_of(TOKENIZERS[kind], text)


@settings(deadline=None)
@given(kinds, st.lists(any_text, max_size=6), st.integers(2, 14))
def test_split_passages_reassemble_their_document(kind, texts, seq_len):
    tokenizer, window = TOKENIZERS[kind], seq_len - 1
    tokens, document = encode_passages(tokenizer, texts, seq_len, "split")
    assert tokens.dtype == document.dtype == np.int32 and tokens.shape == (len(document), seq_len)
    assert (np.diff(document) >= 0).all() and set(document) == set(range(len(texts)))
    assert (tokens[:, 0] == CLS).all() and (tokens[:, 1:] != CLS).all()
    for index, text in enumerate(texts):
        rows = tokens[document == index, 1:]
        ids = ids_of(tokenizer, text)
        read = rows.ravel()[rows.ravel() != PAD].tolist()
        assert read == ids[: len(read)]
        # Only the end of a long text may go, and only if it is less than a quarter of a window.
        dropped = len(ids) - len(read)
        assert dropped == 0 or (4 * dropped < window and len(read) % window == 0 and len(read) > 0)
        assert len(rows) == 1 or 4 * (rows[-1] != PAD).sum() >= window
        assert (rows[:-1] != PAD).all()


@settings(deadline=None)
@given(kinds, st.lists(any_text, max_size=6), st.integers(2, 14))
def test_truncated_passages_hold_the_start(kind, texts, seq_len):
    tokens, document = encode_passages(TOKENIZERS[kind], texts, seq_len, "truncate")
    assert document.tolist() == list(range(len(texts)))
    for row, text in zip(tokens, texts, strict=True):
        ids = ids_of(TOKENIZERS[kind], text)[: seq_len - 1]
        assert row.tolist() == [CLS, *ids] + [PAD] * (seq_len - 1 - len(ids))


def test_the_quarter_rule_by_hand():
    tokenizer = TOKENIZERS["bpe"]
    for length, passages in [(0, 1), (1, 1), (8, 1), (9, 1), (10, 2), (16, 2), (17, 2), (18, 3)]:
        assert len(encode_passages(tokenizer, ["~" * length], 9, "split")[0]) == passages


def test_many_texts_keep_their_order():
    texts = [f"lower {number}" for number in range(5000)]
    tokens, document = encode_passages(TOKENIZERS["bpe"], texts, 16, "split")
    assert document.tolist() == list(range(5000))
    for number in (0, 4095, 4096, 4999):
        assert (
            TOKENIZERS["bpe"].decode(tokens[number, 1:][tokens[number, 1:] != PAD].tolist()) == texts[number]
        )


@pytest.mark.parametrize(
    "kind, size, field, part",
    [
        ("word-piece", 300, "data.tokenizer", "'wordpiece'"),
        ("wordpiece", 63, "data.vocab_size", "at least 64"),
        ("bpe", 258, "data.vocab_size", "at least 259"),
    ],
)
def test_training_errors(kind, size, field, part):
    with pytest.raises(InputError) as caught:
        train_tokenizer(TEXTS, kind, size)
    assert caught.value.field == field and part in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("seq_len, long_text, field", [(1, "split", "seq_len"), (8, "cut", "long_text")])
def test_passage_errors(seq_len, long_text, field):
    with pytest.raises(InputError) as caught:
        encode_passages(TOKENIZERS["bpe"], TEXTS, seq_len, long_text)
    assert caught.value.field == f"data.{field}"


def test_passages_that_no_memory_holds_are_refused():
    with pytest.raises(InputError, match=r"data\.seq_len=.*: 2 passages .* more than the memory"):
        encode_passages(TOKENIZERS["bpe"], ["one text", "another"], 10**14, "split")
