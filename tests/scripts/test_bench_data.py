"""The data benchmark's loops read what they say they read, and its table says what was measured."""

import json

import numpy as np
import pytest

from sieve.scripts import bench_data
from sieve.scripts.bench import command
from sieve.train.cli import main


class Store:
    documents = [np.arange(n, dtype=np.uint16) for n in (5, 9, 4)]
    num_documents, num_tokens, id = 3, 18, "x"

    def document(self, index):
        return self.documents[index]

    def length(self, index):
        return len(self.documents[index])


def test_the_plain_loop_reads_a_flat_file(tmp_path):
    path = tmp_path / "flat.bin"
    dtype = bench_data.flat_file(Store(), path, 10)
    assert np.fromfile(path, dtype).tolist() == [*range(5), *range(9)]
    assert bench_data.plain_loop(path, dtype, 4, 30) == 28


def test_a_small_run_measures_everything(tmp_path, capsys):
    text = tmp_path / "text"
    text.mkdir()
    for i in range(30):
        (text / f"{i}.txt").write_text(" ".join(f"word{j % 7}" for j in range(100 + i)))
    code = main([
        "bench", "data", "data=files", f"data.paths=[{text}]", f"data.cache_dir={tmp_path}/cache",
        "data.validation_fraction=0.1",
        "tokenizer.vocab_size=278", "seq_len=64", "global_batch=4", "micro_batch=2", "--tokens", "2000", "--rounds", "1",
        "--busy-ms", "1", "--rival-bytes", "0", "--out", f"{tmp_path}/out",
    ])
    assert code == 0
    shown, found = capsys.readouterr().out, json.loads((tmp_path / "out" / "data.json").read_text())
    assert set(found["tokens_per_cpu_second"]) == {
        "plain numpy loop", "sieve, concatenate", "sieve, best_fit", "sieve, document",
    }
    assert all(len(rates) == 1 and rates[0] > 0 for rates in found["tokens_per_cpu_second"].values())
    assert set(found["busy_loop"]) == {"no data", "in the loop", "thread", "process"}
    assert found["padding_share"]["concatenate"] == 0 < found["padding_share"]["document"]
    assert "sieve, best_fit" in shown and found["environment"]["cores"] > 0


def test_a_mistake_and_an_unknown_benchmark(capsys):
    assert bench_data.main(["data=books-python"]) == 2
    assert "is a mixture; name one source" in capsys.readouterr().err
    assert command.main(["speed"]) == 2 and "attention" in capsys.readouterr().err
    assert command.main(["--help"]) == 0 and "streaming text" in capsys.readouterr().out


def test_numbers_that_measure_nothing_are_refused(capsys):
    for arguments, said in (
        (["--rounds", "0"], "--rounds: 0 is no whole number of at least 1"), (["--tokens", "-5"], "--tokens: -5 is no whole"),
        (["--rounds", "2.5"], "--rounds: 2.5 is no whole number"), (["--busy-ms", "nan"], "--busy-ms: nan is no number"),
    ):
        with pytest.raises(SystemExit) as end:
            bench_data.main(arguments)
        assert end.value.code == 2 and said in capsys.readouterr().err
    assert bench_data.main(["--tokens", "63", "seq_len=64"]) == 2
    assert "--tokens 63 is less than a row: seq_len=64" in capsys.readouterr().err


@pytest.mark.slow
def test_the_rival_reads_all_of_the_text(tmp_path, tokenizer_of_words):
    pytest.importorskip("torchdata", reason="the rival needs the extra bench")
    file = tmp_path / "text.jsonl"
    texts = [" ".join(f"word{j % 7}" for j in range(100 + i)) for i in range(40)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    whole = sum(len(ids) + 2 for ids in tokenizer_of_words.encode(texts))
    assert whole - 3 * 64 < bench_data.rival_loop(file, tokenizer_of_words, 64) <= whole


@pytest.fixture
def tokenizer_of_words():
    from sieve.data.config import TokenizerConfig
    from sieve.data.tokenizer import train

    return train([" ".join(f"word{j}" for j in range(50))] * 20, TokenizerConfig(vocab_size=278))
