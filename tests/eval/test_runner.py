"""A suite from settings to files, on a random model; the loss on documents against the decoder's own."""

import json

import numpy as np
import pytest
import torch

from sieve.eval.config import SuiteConfig
from sieve.eval.documents import document_loss, read_documents, stored_documents, token_loss_of
from sieve.eval.health import probe, switch_losses
from sieve.eval.load import Loaded, Text
from sieve.eval.report import print_result, write_report
from sieve.eval.results import read_results, write_results
from sieve.eval.runner import run_suite
from sieve.kernels.nsa.layout import Packing

LETTERS = Text(
    lambda text: [b % 61 for b in text.encode()], lambda ids: "".join(chr(97 + i % 26) for i in ids), 1, 2,
    torch.tensor([0, 0, 0, *[1] * 58]),
)


def documents(limit=None):
    rng = np.random.default_rng(0)
    return [np.array([1, *rng.integers(3, 61, n), 2]) for n in (5, 90, 200, 33)]


class Stored:
    """A store of these documents."""

    def __init__(self, own):
        self.num_documents, self.document = len(own), own.__getitem__


def settings(**changes):
    return SuiteConfig.model_validate({
        "needle": {"lengths": [160, 200], "depths": [0, 1], "samples": 1, "digits": 2, "keys": 2},
        "recall": {"pairs": [4], "lengths": [12], "samples": 2}, "batch_tokens": 300, **changes,
    })


def test_document_loss_equals_the_decoder_s(tiny):
    decoder, bytes_of = tiny(), LETTERS.bytes_of
    by_position, by_length = document_loss(token_loss_of(decoder), documents(), bytes_of, 100, 150)
    total, count = 0.0, 0
    lengths = {}
    for document in documents():
        own = 0.0
        for start in range(0, len(document), 100):  # pieces of at most 100 tokens; labels reach into the next piece
            piece = torch.from_numpy(document[start : start + 100])[None]
            n = piece.shape[1]
            logits = decoder.logits(piece, Packing.of(torch.tensor([0, n], dtype=torch.int32), n, n))[0]
            wanted = torch.from_numpy(document[start + 1 : start + 101])
            own += torch.nn.functional.cross_entropy(logits[: len(wanted)], wanted, reduction="sum").item()
        total, count = total + own, count + len(document) - 1
        lengths[2 ** (len(document).bit_length() - 1)] = own / (len(document) - 1) if len(document) != 35 else None
    assert by_position.mean() == pytest.approx(total / count, rel=1e-5)
    rows = {row["from"]: row for row in by_length.rows()}
    assert list(rows) == [4, 32, 64, 128] and rows[128]["tokens"] == 201
    for start in (4, 64, 128):
        assert rows[start]["loss"] == pytest.approx(lengths[start], rel=1e-5)
    assert sum(row["tokens"] for row in by_position.rows()) == count


def test_documents_of_files(tmp_path):
    (tmp_path / "a.txt").write_text("abcdef")
    (tmp_path / "b.txt").write_text("ghijkl")
    found = list(read_documents([str(tmp_path)], LETTERS, 11))
    assert [len(d) for d in found] == [8, 3] and found[0][0] == 1 and found[0][-1] == 2
    (tmp_path / "empty").mkdir()
    for name in ("none.txt", "x.png"):
        (tmp_path / name).touch()
    for path in ("nowhere.txt", "empty", "none.txt", "x.png"):
        with pytest.raises(ValueError, match=r"^loss\.source: ") as error:
            read_documents([str(tmp_path / path)], LETTERS, 11)
        assert "data." not in str(error.value)


def test_all_of_it_to_files(tiny, tmp_path):
    model = Loaded("m", tiny(), LETTERS, 128)
    seen = []
    results = run_suite(model, settings(suite="all"), {"text": documents}, report=seen.append)
    assert [r.task for r in results] == list(settings(suite="all").suite) == [r.task for r in seen]
    measured = write_results(results, tmp_path / "out", {"command": "x"})
    files = write_report(measured, tmp_path / "out", "m")
    names = {path.name for path in files}
    assert names == {"loss.png", "needle.png", "multikey.png", "passkey.png", "health.png", "switches.png",
                     "report.html"}
    data = json.loads((tmp_path / "out" / "results.json").read_text())
    assert 0 <= data["metrics"]["eval/mqar"] <= 1 and data["metrics"]["eval/loss"] > 0
    assert "eval/needle_len_0160" in data["metrics"] and data["tasks"]["health"]["tables"]["health"][1]["layer"] == 1
    html = (tmp_path / "out" / "report.html").read_text()
    assert html.count("data:image/png;base64,") == 6 and "Measured on" not in html
    # What was stored says as much as what was measured: it gives the same pictures, on a page that tells models apart.
    before = [path.read_bytes() for path in files[:-1]]
    again = write_report(read_results(tmp_path / "out"), tmp_path / "out", "m")
    assert [path.read_bytes() for path in again[:-1]] == before and again[-1].read_text() == html
    others = write_results(results[:1], tmp_path / "out", {"model": "m later"})
    assert list(others) == [r.task for r in results]
    write_report(others, tmp_path / "out", "m")
    assert (tmp_path / "out" / "report.html").read_text().count("Measured on m later") == 1
    from rich.console import Console

    with (tmp_path / "log").open("w") as log:
        for result in results:
            print_result(result, Console(file=log, width=80))
    assert "as trained" in (tmp_path / "log").read_text() and "mass_recalled" in (tmp_path / "log").read_text()


def test_probe(tiny):
    texts = [d.tolist() for d in documents()]
    rows = probe(tiny(), texts)
    assert [row["layer"] for row in rows] == [0, 1]
    for row in rows:
        assert 0 < row["mass_forced"] < row["mass_recalled"] < row["mass_oracle"] <= 1
        # 202 tokens are 13 blocks, of which 4 are chosen, 3 of them forced: one free choice a query and group.
        choices = sum(max(0, min(len(t), 1 << 30) - 3 * 16) for t in texts) * 2
        assert sum(row["back"]) == choices
    short = probe(tiny(), [[1, 5, 6, 2]])
    assert short[0]["mass_recalled"] is None and short[0]["back"] == []


def test_switches_change_the_loss(tiny):
    rows = switch_losses(tiny(), documents(), LETTERS.bytes_of, 256, 1000, (13,))
    found = {row["variant"]: row["gap"] for row in rows}
    assert list(found)[0] == "as trained" and found["as trained"] == 0
    assert found["topk 13"] == pytest.approx(found["full on selection's K/V"], abs=1e-5)
    assert abs(found["without window"]) > 1e-3


def test_sources_share_the_tokens_and_are_told_apart(tiny):
    def others(limit=None):
        return stored_documents(Stored(documents()[::-1]), limit)

    def first(limit=None):
        return stored_documents(Stored(documents()), limit)

    loss = settings(suite=["loss"], loss={"max_tokens": 120})
    model = Loaded("m", tiny(), LETTERS, 128)
    (both,) = run_suite(model, loss, {"a": first, "b": others})
    one, two = (
        run_suite(model, settings(suite=["loss"], loss={"max_tokens": 60}), {"only": own})[0] for own in (first, others)
    )
    assert "loss by source" not in one.tables and "eval/only/loss" not in one.metrics
    assert both.metrics["eval/a/loss"] == one.metrics["eval/loss"]
    assert both.metrics["eval/b/loss"] == two.metrics["eval/loss"]
    rows = {row["source"]: row["tokens"] for row in both.tables["loss by source"]}
    weighed = (rows["a"] * one.metrics["eval/loss"] + rows["b"] * two.metrics["eval/loss"]) / sum(rows.values())
    assert both.metrics["eval/loss"] == pytest.approx(weighed)


def test_up_to_dense_len_there_is_no_selection_to_measure(tiny):
    texts = {"text": documents}
    for task in ("health", "switches"):
        with pytest.raises(ValueError, match=f"{task}: no text has more than 100 tokens, and up to attention.dense_len=100 m"):
            run_suite(Loaded("m", tiny(dense_len=100), LETTERS, 100), settings(suite=[task]), texts)
    (health,) = run_suite(Loaded("m", tiny(dense_len=100), LETTERS, 128), settings(suite=["health"]), texts)
    (without,) = run_suite(Loaded("m", tiny(), LETTERS, 128), settings(suite=["health"]), texts)
    assert health.tables == without.tables  # one text is longer, which makes all of the call sparse


def test_mistakes_are_told_before_the_first_task(tiny, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    nsa, full = Loaded("m", tiny(), LETTERS, 128), Loaded("m", tiny("full"), LETTERS, 128)
    short = Loaded("m", tiny(dense_len=512), LETTERS, 128)
    there = {"text": documents}
    nothing = {"text": lambda limit: []}
    missing = {"text": lambda limit: read_documents([str(tmp_path / "b.txt")], LETTERS, limit)}
    for model, texts, changes, message in (
        (full, there, {"suite": ["copy", "health"]}, r"health is about NSA, .* no NSA layer; leave it out, as suite=\[copy\]"),
        (full, there, {"suite": ["switches"]}, "switches is about NSA, and m has no NSA layer; leave it out of suite"),
        (full, there, {"suite": "all"}, r"as suite=\[loss,needle,multikey,passkey,mqar,copy,induction\]"),
        (nsa, there, {"suite": ["copy", "needle"], "needle": {"lengths": [200, 20]}}, "needle.lengths=20 is too short"),
        (nsa, there, {"suite": ["copy", "multikey"], "needle": {"keys": 99}}, "needle.keys=99"),
        (nsa, there, {"suite": ["copy", "mqar"], "recall": {"pairs": [4, 4000]}}, "recall.pairs=4000 is more than the 29 t"),
        (nsa, there, {"suite": ["copy", "switches"], "health": {"larger_topk": [8, 1]}}, "health.larger_topk has 1: topk=1"),
        (nsa, {}, {"suite": ["copy", "loss"]}, "loss needs text"),
        (nsa, nothing, {"suite": ["copy", "loss"]}, "loss: no document of text has two tokens or more"),
        (nsa, missing, {"suite": ["copy", "needle"], "needle": {"lengths": [200]}}, "'.*b.txt' does not exist"),
        (nsa, missing, {"suite": ["copy", "loss"]}, "'.*b.txt' does not exist"),
        (short, there, {"suite": ["copy", "health"]}, "health: no text has more than 128 tokens"),
        (nsa, there, {"suite": ["copy", "harness"], "harness": {"offline": True}}, "harness"),
    ):
        with pytest.raises(ValueError, match=message):
            run_suite(model, settings(**changes), texts, report=lambda result: pytest.fail(result.task))


def test_texts_that_leave_nothing_to_choose_are_noted(tiny):
    suite = settings(suite=["health", "switches"], health={"larger_topk": [8]})
    for seq_len, noted in ((64, True), (66, False)):  # 4 blocks of 16; the last token has no label
        for result in run_suite(Loaded("m", tiny(), LETTERS, seq_len), suite, {"text": documents}):
            assert ("more blocks than topk, that is more than 64 tokens, and the longest has 64" in result.note) is noted
            gaps = {row.get("variant"): row.get("gap") for row in result.tables[result.task]}
            assert result.task == "health" or (abs(gaps["topk 8"]) < 1e-6) is noted


def test_users_mistakes(tiny):
    model = Loaded("m", tiny("full"), LETTERS, 128)
    with pytest.raises(ValueError, match="loss needs text: give loss.source"):
        run_suite(model, settings(suite=["loss"]), {})
    with pytest.raises(ValueError, match="health is about NSA, and m has no NSA layer"):
        run_suite(model, settings(suite=["health"]), {"text": documents})
    with pytest.raises(ValueError, match="needle needs the model's tokenizer"):
        run_suite(Loaded("m", tiny(), None, 128), settings(suite=["needle"]), {"text": documents})
    assert settings(suite=["needle", "recall"]).suite == ("needle", "mqar", "copy", "induction")
    assert settings(suite="needle").suite == ("needle", "multikey", "passkey")
    with pytest.raises(ValueError, match="needl is no suite and no task; did you mean needle"):
        settings(suite="needl")
