"""Scores of whole documents, against loops over documents and classes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfedmoe_jax.evaluation import BatchScore
from hfedmoe_jax.quality import Ratio, score_documents, summarize
from hfedmoe_jax.tasks import NO_DOCUMENTS, classification
from hfedmoe_jax.tasks.classification import class_scores, document_log_probs

CLASSES = 4


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.integers(0, 2**32 - 1))
def test_a_document_has_the_mean_of_its_passages(document, seed):
    log_probs = np.random.default_rng(seed).normal(size=(len(document), CLASSES))
    means, first = document_log_probs(log_probs, np.array(document))
    for place, number in enumerate(sorted(set(document))):
        passages = [index for index, of in enumerate(document) if of == number]
        assert first[place] == passages[0]
        np.testing.assert_allclose(means[place], sum(log_probs[i] for i in passages) / len(passages))


@given(st.lists(st.tuples(*[st.integers(0, CLASSES - 1)] * 2), min_size=1, max_size=20))
def test_scores_by_class_are_those_of_a_count(pairs):
    answer, label = np.array(pairs).T
    scores = class_scores(answer, label, CLASSES)
    for of in range(CLASSES):
        hits = sum(said == true == of for said, true in pairs)
        said, there = sum(said == of for said, _ in pairs), sum(true == of for _, true in pairs)
        precision, recall = hits / said if said else 0, hits / there if there else 0
        assert scores["precision"][of] == pytest.approx(precision)
        assert scores["recall"][of] == pytest.approx(recall)
        both = precision + recall
        assert scores["f1"][of] == pytest.approx(2 * precision * recall / both if both else 0)
        assert scores["documents"][of] == there


def test_one_sure_passage_outvotes_two_unsure_ones():
    """Batches of two, the last place is padding; two documents, the first of three passages."""
    sure, unsure = np.log([0.9, 0.1]), np.log([0.4, 0.6])
    evidence = np.array([[unsure, sure], [unsure, unsure], [unsure, sure]])
    zero = Ratio(np.zeros(3), np.ones(3))
    batches = BatchScore({"accuracy": zero}, np.zeros((3, 1, 2)), zero, evidence)
    rows = {"labels": np.array([0, 0, 0, 1, 1]), "tokens": np.zeros((5, 3))}
    documents = score_documents(classification, batches, rows, np.array([3, 3, 3, 7, 7]))
    assert documents.scores == {"document_accuracy": 1.0, "document_macro_f1": 1.0}
    assert summarize(batches, documents).scores == {"accuracy": 0.0} | documents.scores


def test_a_task_without_documents_has_no_such_scores():
    task = classification._replace(evidence=None, score_documents=None, document_scores=())
    batches = BatchScore({}, np.zeros((1, 1, 2)), Ratio(np.zeros(1), np.ones(1)), ())
    assert score_documents(task, batches, {}, np.zeros(0, int)) == NO_DOCUMENTS
