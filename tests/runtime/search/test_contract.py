"""What every store of vectors promises, as far as it can be said without a store."""

from __future__ import annotations

import numpy as np
import pytest

from qingyu.errors import DocumentError, InvalidOptionError, VectorSpaceError
from qingyu.runtime.search.contract import (
    Document,
    EmbeddedDocument,
    VectorSpace,
    check_documents,
    check_query,
    check_space,
    matches,
    score,
)

SPACE = VectorSpace(fingerprint="qy1-a", query="qy1-b", dim=2)


@pytest.mark.parametrize(
    ("fields", "where", "passes"),
    [
        ({"type": "faq"}, None, True),
        ({"type": "faq"}, {"type": "faq"}, True),
        ({"type": "faq", "year": 1}, {"type": "faq", "year": 2}, False),
        ({"year": 1}, {"year": [2, 1.0]}, True),
        ({"year": 1}, {"year": "1"}, False),
        ({"year": 1}, {"year": True}, False),
        ({"year": True}, {"year": 1}, False),
        ({}, {"year": None}, True),
        ({"tags": ["a"]}, {"tags": "a"}, False),
    ],
)
def test_a_filter_compares_as_json(fields, where, passes):
    assert matches(fields, where) is passes


def test_scores_are_the_metrics_and_larger_is_nearer():
    query, vectors = np.float32([3, 4]), np.float32([[3, 4], [4, -3], [6, 8]])
    assert score("cosine", query, vectors) == pytest.approx([1, 0, 1])
    assert score("dot", query, vectors) == pytest.approx([25, 0, 50])
    assert score("euclidean", query, vectors) == pytest.approx([0, -np.sqrt(50), -5])


@pytest.mark.parametrize(("name", "text"), [("", "今天"), ("a", ""), ("a", " \n"), (3, "今天"), ("a", None)])
def test_a_document_without_id_or_text_is_refused(name, text):
    with pytest.raises(DocumentError):
        Document(name, text)


def test_the_digest_follows_text_and_fields_and_not_their_order():
    one = Document("a", "今天", {"x": 1, "y": 2})
    assert one.digest == Document("b", "今天", {"y": 2, "x": 1}).digest
    assert len({one.digest, Document("a", "明天", one.fields).digest, Document("a", "今天").digest}) == 3


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (VectorSpace("qy1-c", "qy1-b", 2), "fingerprint qy1-c, found qy1-a"),
        (VectorSpace("qy1-a", "qy1-c", 2), "fingerprint qy1-c, found qy1-b"),
        (VectorSpace("qy1-a", "qy1-b", 3), "dimensions 3, found 2"),
    ],
)
def test_another_space_is_refused_by_what_differs(other, said):
    check_space(SPACE, SPACE, place="kb")
    with pytest.raises(VectorSpaceError, match=said):
        check_space(SPACE, other, place="kb")


def test_another_metric_is_refused():
    with pytest.raises(InvalidOptionError, match="expected dot, found cosine"):
        check_space(SPACE, VectorSpace("qy1-a", "qy1-b", 2, "dot"), place="kb")


@pytest.mark.parametrize("vector", [[1, 2, 3], [[1, 2]], [1, float("nan")]])
def test_a_query_that_does_not_fit_is_refused(vector):
    with pytest.raises(VectorSpaceError):
        check_query(vector, SPACE)


def test_documents_that_do_not_fit_are_refused():
    good = EmbeddedDocument.whole(Document("a", "今天"), np.float32([1, 0]))
    check_documents([good], SPACE)
    with pytest.raises(DocumentError, match="'a'"):
        check_documents([good, good], SPACE)
    with pytest.raises(VectorSpaceError, match="document 'b'"):
        check_documents([EmbeddedDocument.whole(Document("b", "今天"), np.float32([1, 0, 0]))], SPACE)
