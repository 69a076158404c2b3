import sys
import time

import datasets
import pytest
import tensorflow_datasets as tfds

from hfedmoe_jax.data import Documents, downloads, load_source
from hfedmoe_jax.errors import InputError

# Nothing listens on the discard port: a connection is refused at once, with or without a network.
NOWHERE = "http://127.0.0.1:9"
TEXTS = [f"Grüße {number}" for number in range(6)]
NAMES = ["up", "down"]


def error_of(config):
    with pytest.raises(InputError) as caught:
        load_source(config.data)
    assert "\n" not in str(caught.value)
    return caught.value


def save_hub_folder(folder, label=0, splits=("train", "test")):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=NAMES)}
    )
    for split in splits:
        count = 6 if split == "train" else 2
        rows = {"text": TEXTS[:count], "label": [number % 2 for number in range(count - 1)] + [label]}
        dataset = datasets.Dataset.from_dict(rows, features=features)
        (folder / "data").mkdir(parents=True, exist_ok=True)
        dataset.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return str(folder)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", NOWHERE)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


def test_hub_gives_class_names_and_both_splits(make_config, tmp_path):
    name = save_hub_folder(tmp_path / "tiny")
    corpus = load_source(make_config(source=f"hub:{name}", cache_dir=str(tmp_path / "cache")).data)
    assert corpus.train == Documents(TEXTS, ["up", "down", "up", "down", "up", "up"], None)
    assert corpus.test == Documents(TEXTS[:2], ["up", "up"], None)


def test_hub_without_a_label_or_a_train_split(make_config, tmp_path):
    cache = str(tmp_path / "cache")
    name = save_hub_folder(tmp_path / "unlabelled", label=-1)
    error = error_of(make_config(source=f"hub:{name}", cache_dir=cache))
    assert error.field == "data.label_column" and "row 6" in str(error) and "(train)" in str(error)
    name = save_hub_folder(tmp_path / "testonly", splits=("test",))
    error = error_of(make_config(source=f"hub:{name}", cache_dir=cache))
    assert error.field == "data.train_split" and "it has test" in str(error)
    name = save_hub_folder(tmp_path / "other")
    error = error_of(make_config(source=f"hub:{name}", cache_dir=cache, text_column="body"))
    assert error.field == "data.text_column" and "'text', 'label'" in str(error)


def test_hub_splits_are_chosen_by_name(make_config, tmp_path):
    folder = save_hub_folder(tmp_path / "three", splits=("train", "test", "validation"))
    fields = {"source": f"hub:{folder}", "cache_dir": str(tmp_path / "cache")}
    corpus = load_source(make_config(**fields).data)
    assert corpus.validation is None and corpus.test is not None
    corpus = load_source(make_config(**fields, validation_split="validation", test_split="train").data)
    assert corpus.validation.texts == TEXTS[:2] and corpus.test.texts == TEXTS
    error = error_of(make_config(**fields, test_split="tset"))
    assert error.field == "data.test_split" and "train" in str(error)


def test_an_unlabelled_test_split_is_told_and_one_is_cut(make_config, tmp_path):
    folder = tmp_path / "unlabelled"
    save_hub_folder(folder, splits=("train",))
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=NAMES)}
    )
    rows = {"text": ["a", "b"], "label": [-1, -1]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(
        folder / "data" / "test-00000-of-00001.parquet"
    )
    fields = {"source": f"hub:{folder}", "cache_dir": str(tmp_path / "cache")}
    corpus = load_source(make_config(**fields).data)
    assert corpus.test is None and "no labels" in corpus.notes[0]
    error = error_of(make_config(**fields, test_split="test"))
    assert error.field == "data.label_column" and "row 1" in str(error)


def test_hub_subsets(make_config, tmp_path):
    for subset in ("first", "second"):
        save_hub_folder(tmp_path / "two" / subset, splits=("train",))
    subsets = {"one": "first", "other": "second"}
    card = [f"- config_name: {name}\n  data_files: {path}/data/*" for name, path in subsets.items()]
    (tmp_path / "two" / "README.md").write_text("\n".join(["---", "configs:", *card, "---"]))
    fields = {"source": f"hub:{tmp_path / 'two'}", "cache_dir": str(tmp_path / "cache")}
    error = error_of(make_config(**fields))
    assert "data.subset" in str(error) and "'other'" in str(error) and "network" not in str(error)
    error = error_of(make_config(**fields, subset="third"))
    assert "data.subset" in str(error) and "'other'" in str(error)
    assert load_source(make_config(**fields, subset="other").data).train.texts == TEXTS


def test_errors_of_the_library_are_not_the_networks(make_config, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_bytes(b"PAR1 no more")
    error = error_of(make_config(source=f"hub:{tmp_path / 'broken'}", cache_dir=str(tmp_path / "cache")))
    assert error.field == "data.source" and "network" not in str(error) and "datasets" in str(error)


def test_hub_out_of_reach_fails_soon_and_says_what_to_do(make_config, tmp_path, no_hub):
    started = time.monotonic()
    error = error_of(make_config(source="hub:someone/absent", cache_dir=str(tmp_path)))
    assert time.monotonic() - started < 10
    assert error.field == "data.source" and error.value == "hub:someone/absent"
    assert f"{NOWHERE} does not answer" in str(error)
    assert "data.source=file" in str(error) and "network" in str(error)
    assert not datasets.config.HF_HUB_OFFLINE


def test_hub_out_of_reach_uses_what_was_loaded_before(make_config, tmp_path, no_hub, monkeypatch):
    save_hub_folder(tmp_path / "tiny")
    cache = str(tmp_path / "cache")
    before = load_source(make_config(source=f"hub:{tmp_path / 'tiny'}", cache_dir=cache).data)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_source(make_config(source="hub:tiny", cache_dir=cache).data) == before


class TinyTopics(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(names=NAMES)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(6), "test": self._generate_examples(2)}

    def _generate_examples(self, count):
        for number in range(count):
            yield number, {"text": TEXTS[number], "label": number % 2}


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    TinyTopics(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_tfds_reads_prepared_data_without_tensorflow(make_config, tfds_folder):
    by_name = load_source(make_config(source="tfds:tiny_topics", cache_dir=str(tfds_folder)).data)
    assert set(zip(by_name.train.texts, by_name.train.labels, strict=True)) == {
        (text, NAMES[number % 2]) for number, text in enumerate(TEXTS)
    }
    assert sorted(by_name.test.texts) == TEXTS[:2]
    folder = tfds_folder / "tiny_topics" / "1.0.0"
    assert load_source(make_config(source=f"tfds:{folder}").data) == by_name
    assert "tensorflow" not in sys.modules


def test_tfds_prepares_a_data_set_that_downloads_nothing(make_config, tmp_path):
    """It has no checksums of downloads, and so no addresses to probe."""
    assert TinyTopics.url_infos is None
    corpus = load_source(make_config(source="tfds:tiny_topics", cache_dir=str(tmp_path)).data)
    assert sorted(corpus.test.texts) == TEXTS[:2]


def test_tfds_errors(make_config, tfds_folder, tmp_path, monkeypatch):
    cache = str(tfds_folder)
    error = error_of(make_config(source="tfds:tiny_topics", cache_dir=cache, label_column="lable"))
    assert error.field == "data.label_column" and "did you mean 'label'?" in str(error)
    error = error_of(make_config(source="tfds:imdb_review", cache_dir=cache))
    assert error.field == "data.source" and "'imdb_reviews'" in str(error) and len(str(error)) < 400
    assert error_of(make_config(source=f"tfds:{tmp_path}")).field == "data.source"

    monkeypatch.setattr(TinyTopics, "url_infos", {f"{NOWHERE}/tiny.zip": None})
    started = time.monotonic()
    error = error_of(make_config(source="tfds:tiny_topics", cache_dir=str(tmp_path)))
    assert time.monotonic() - started < 10
    assert "does not answer" in str(error) and "data.source=file" in str(error)

    def needs_a_module(url):
        raise ModuleNotFoundError("No module named 'lxml'", name="lxml")

    monkeypatch.setattr(downloads, "_answers", needs_a_module)
    error = error_of(make_config(source="tfds:tiny_topics", cache_dir=str(tmp_path)))
    assert "pip install lxml" in str(error)
