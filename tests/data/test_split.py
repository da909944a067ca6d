"""Training and validation share nothing, cover everything, and neither is empty if there are two documents."""

import pytest

from sieve.data.document import Document
from sieve.data.split import Split


class Listed:
    description, done = {"type": "list"}, 0.0

    def __init__(self, *texts):
        self.texts = texts

    def __iter__(self):
        return (Document(str(i), text, i) for i, text in enumerate(self.texts))

    def skipped(self):
        return "7 broken"


def parted(source, fraction):
    split = Split.of(source, fraction)
    parts = {"train": [], "validation": []}
    for document in source:
        for part, text in split.parts(document):
            parts[part].append(text)
    return parts["train"], parts["validation"]


@pytest.mark.parametrize("count, fraction, held", [(2, 0.01, 1), (200, 0.01, 2), (200, 0.1, 20), (9, 0.5, 5)])
def test_every_kth_document(count, fraction, held):
    texts = [f"t{i}" for i in range(count)]
    train, validation = parted(Listed(*texts), fraction)
    assert sorted(train + validation) == sorted(texts) and len(validation) == held


def test_a_single_document_is_cut_after_a_line():
    text = "".join(f"line {i}\n" for i in range(100))
    (train,), (validation,) = parted(Listed(text), 0.1)
    assert train + validation == text and train.endswith("\n")
    assert 0.08 < len(validation) / len(text) < 0.12
    assert parted(Listed("x" * 10), 0.2) == (["x" * 8], ["x" * 2])
    assert parted(Listed("x"), 0.2) == (["x"], [])


def test_no_document_is_an_error():
    with pytest.raises(ValueError, match="no document in .*7 broken"):
        Split.of(Listed(), 0.1)


def test_a_source_of_its_own_is_whole():
    assert list(Split(None, "validation").parts(Document("a", "text", 0))) == [("validation", "text")]
