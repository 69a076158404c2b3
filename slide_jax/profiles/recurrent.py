"""A recurrent language model: a unit is the embedding, an LSTM layer over the whole sequence, or the head."""

from slide_jax.profiles.layers import Layer, Profile, dense, layer, positive_integers, table

VOCABULARY = 10_000
DEPTH = 2


def lstm_layer(name: str, inputs: int, units: int, tokens: int) -> Layer:
    """Returns an LSTM layer: four gates of input and state, one bias each (PyTorch keeps two)."""
    return layer(name, dense(inputs + units, 4 * units, tokens))


def lstm(width: int = 1500, sequence_length: int = 35, accuracy: float = 1 / 78.4) -> Profile:
    """Returns the word-level LSTM language model of Zaremba et al. (arXiv 1409.2329) for the Penn Treebank.

    Args:
      width: units of both layers and of the embedding; 1500 is the paper's large model, 650 the medium one.
      sequence_length: words of one example; the paper unrolls over 35.
      accuracy: the probability of a next word, geometric mean: one over the perplexity, by default
        the large model's on the test set, 78.4. On no scale with another task's.

    Raises:
      InputError: a size below 1.
    """
    width, sequence_length = positive_integers(width=width, sequence_length=sequence_length)
    layers = (
        layer("embedding", table(VOCABULARY, width)),
        *(lstm_layer(f"lstm.{index}", width, width, sequence_length) for index in range(DEPTH)),
        layer("head", dense(width, VOCABULARY, sequence_length)),
    )
    return Profile("lstm", "next_word", accuracy, layers)
