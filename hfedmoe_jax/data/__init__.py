"""From a config to tokenised federated data: sources, tokenizers, partitions into clients, batches."""

from hfedmoe_jax.data.batches import holdout_batches, most_tokens, pad_batches, round_batches
from hfedmoe_jax.data.columns import Corpus, Documents
from hfedmoe_jax.data.facts import Facts
from hfedmoe_jax.data.federated import FederatedData, Rows, host_of, load_federated, num_rows, take
from hfedmoe_jax.data.fingerprint import fingerprint
from hfedmoe_jax.data.partition import PARTITIONS, partition_documents
from hfedmoe_jax.data.prefetch import Prefetch
from hfedmoe_jax.data.sources import load_source
from hfedmoe_jax.data.tokenizers import encode_passages, from_json, to_json, train_tokenizer

__all__ = [
    "PARTITIONS",
    "Corpus",
    "Documents",
    "Facts",
    "FederatedData",
    "Prefetch",
    "Rows",
    "encode_passages",
    "fingerprint",
    "from_json",
    "holdout_batches",
    "host_of",
    "load_federated",
    "load_source",
    "most_tokens",
    "num_rows",
    "pad_batches",
    "partition_documents",
    "round_batches",
    "take",
    "to_json",
    "train_tokenizer",
]
