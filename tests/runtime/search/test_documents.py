"""Files of documents: what is read, what is given as a bad row, and what cannot be read at all."""

from __future__ import annotations

import gzip

import pytest

from qingyu.errors import DataFileError
from qingyu.runtime.search import documents as module
from qingyu.runtime.search.contract import Document
from qingyu.runtime.search.documents import BadRow, read_documents

GOOD = b'{"id": 7, "text": "\xe4\xbb\x8a\xe5\xa4\xa9", "type": "faq"}\n'


def test_json_lines_give_documents_with_fields_and_lines(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n" + GOOD.replace(b"7", b'"b"'))
    found = list(read_documents(str(path)))
    assert found == [Document("7", "今天", {"type": "faq"}), Document("b", "今天", {"type": "faq"})]
    assert [one.line for one in found] == [1, 3]


def test_tsv_and_gzip_and_other_names_of_fields_are_read(tmp_path):
    path = tmp_path / "d.tsv.gz"
    path.write_bytes(gzip.compress("key\tbody\tyear\na\t今天\t2024\nb\t明天\n".encode()))
    first, second = read_documents(str(path), id_field="key", text_field="body")
    assert first == Document("a", "今天", {"year": "2024"})
    assert (second.line, second.id, second.error.expected, second.error.found) == (3, None, "3", "2")


@pytest.mark.parametrize(
    ("line", "name", "said"),
    [
        (b"{", None, "not JSON"),
        (b"[1]", None, "no JSON object"),
        (b"\xff\xfe", None, "byte 0xff at column 1"),
        (b'{"text": "a"}', None, "lacks the field 'id'"),
        (b'{"id": null, "text": "a"}', None, "no name"),
        (b'{"id": true, "text": "a"}', None, "no name"),
        (b'{"id": "", "text": "a"}', "", "no id"),
        (b'{"id": 1}', "1", "lacks the field 'text'"),
        (b'{"id": 1, "text": 3}', "1", "has no text"),
        (b'{"id": 1, "text": " "}', "1", "has no text"),
        (rb'{"id": 1, "text": "\ud800"}', "1", "cannot be stored"),
        (b'{"id": 1, "text": "a", "x": NaN}', "1", "cannot be stored"),
        (b'{"id": 1, "text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", None, "not JSON"),
    ],
)
def test_a_bad_row_is_given_with_its_line_and_the_rest_is_read(tmp_path, line, name, said):
    path = tmp_path / "d.jsonl"
    path.write_bytes(GOOD + line + b"\n" + GOOD)
    first, bad, last = read_documents(str(path))
    assert isinstance(bad, BadRow)
    assert (first.id, bad.line, bad.id, last.id) == ("7", 2, name, "7")
    assert said in str(bad.error)


def test_a_line_too_long_for_memory_is_a_bad_row(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LONGEST_LINE", 1 << 10)
    path = tmp_path / "d.jsonl"
    path.write_bytes(GOOD + b'{"id": 1, "text": "' + b"a" * 5000 + b'"}\n' + GOOD)
    first, bad, last = read_documents(str(path))
    assert "too long" in str(bad.error)
    assert (first.line, bad.line, last.line) == (1, 2, 3)


def test_a_file_that_is_not_there_or_breaks_off_is_an_error(tmp_path):
    with pytest.raises(DataFileError, match="No such file"):
        list(read_documents(str(tmp_path / "absent.jsonl")))
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD * 10_000)[:-20])
    with pytest.raises(DataFileError, match="cannot read"):
        list(read_documents(str(path)))
