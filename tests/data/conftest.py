"""Small stores, a small tokenizer and a slow model of the stream that the tests of data share."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from sieve.data.config import TokenizerConfig
from sieve.data.store import StoreWriter, TokenStore
from sieve.data.tokenizer import train

CODE = '''def area(width, height):
    """Of a rectangle, in square metres."""
    if width < 0 or height < 0:
        raise ValueError(f"negative: {width=} {height=}")

    return width * height


class Shape:
    def __init__(self, name, sides=4):
        self.name, self.sides = name, sides
'''
WORDS = "time year people way day man thing woman life child world school state family student group country".split()


def prose(seed: int, words: int = 400) -> str:
    """Text without sense, the same for the same seed."""
    drawn = np.random.default_rng(seed).choice(WORDS, words)
    return "\n".join(" ".join(drawn[i : i + 12]) + "." for i in range(0, words, 12)) + "\n"


@pytest.fixture(scope="session")
def plain():
    """The module plain.py, which importmode=importlib cannot import by name."""
    spec = importlib.util.spec_from_file_location("plain", Path(__file__).with_name("plain.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def texts():
    return [prose(i) + CODE for i in range(12)]


@pytest.fixture(scope="session")
def small_config():
    return TokenizerConfig(vocab_size=400)


@pytest.fixture(scope="session")
def tokenizer(texts, small_config):
    return train(texts, small_config)


@pytest.fixture
def make_store(tmp_path):
    """documents (lists of ids) -> TokenStore."""
    def make(documents, vocab_size=1 << 16):
        folder = tmp_path / f"store-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        writer = StoreWriter(folder, vocab_size)
        writer.add([np.array(ids) for ids in documents])
        writer.finish()
        return TokenStore(folder)

    return make


@pytest.fixture
def uneven():
    """Documents of 2 to 40 tokens; token 100 * d + i is the i-th of document d, so that each tells where it is from."""
    lengths = np.random.default_rng(0).integers(2, 41, 23)
    return [[100 * (d + 1) + i for i in range(n)] for d, n in enumerate(lengths)]


@pytest.fixture(scope="session")
def servers():
    """The module servers.py, which importmode=importlib cannot import by name."""
    spec = importlib.util.spec_from_file_location("servers", Path(__file__).with_name("servers.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
