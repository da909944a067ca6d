"""config=FILE: a user's YAML file says what the same settings on the command line say."""

import pytest
import yaml

from sieve.train.mistakes import ConfigError
from sieve.train.overrides import load_config
from sieve.train.run import main
from sieve.train.settings_file import overrides_of

TEXT = """
model: small
attention: full
attention.window_size: 64
seq_len: 256
name: my-${seed}
optim: {lr: 2.5e-4, betas: [0.9, 0.99]}
model.moe: null
data:
  name: it's "mine" \\
  packing: best_fit
  sources:
    a: {type: files, paths: ["x y.jsonl", "b[1].txt"], weight: 3, upsample: {100: 2.0}}
    b-2: {type: python, weight: 1}
  phases:
    - {from_tokens: 900000, seq_len: 512}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT)
    return path


def test_a_file_is_its_overrides(file):
    found = load_config([f"config={file}", "seed=7"])
    assert found.model.name == "small" and found.attention.type == "full" and found.attention.window_size == 64
    assert found.name == "my-7" and found.optim.lr == 2.5e-4 and found.optim.betas == (0.9, 0.99) and found.model.moe is None
    assert found.data.name == 'it\'s "mine" \\' and found.data.packing == "best_fit"
    assert found.data.sources["a"].paths == ("x y.jsonl", "b[1].txt") and dict(found.data.sources["a"].upsample) == {100: 2.0}
    assert found.data.sources["b-2"].type == "python" and found.data.phases[0].seq_len == 512


def test_what_is_given_later_counts(file, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text("seq_len: 512\nattention: nsa\n")
    assert load_config([f"config={file}", "seed=1", "seq_len=1024"]).seq_len == 1024
    assert load_config(["seq_len=1024", f"config={file}", "seed=1"]).seq_len == 256
    both = load_config([f"config={file}", f"config={other}", "seed=1"])
    assert both.seq_len == 512 and both.attention.type == "nsa" and both.model.name == "small"


@pytest.mark.parametrize("overrides", [
    ["model=nsa-27b", "attention=[full,nsa]"], ["data=books-python", "profile=true"],
], ids=str)  # fmt: skip
def test_a_whole_configuration_comes_back_as_it_was(overrides, tmp_path, capsys):
    assert main([*overrides, "--cfg", "job"]) == 0
    path = tmp_path / "config.yaml"
    path.write_text(capsys.readouterr().out)
    assert load_config([f"config={path}"]) == load_config(overrides)
    assert yaml.safe_load(path.read_text())["profile"]["enabled"] == ("profile=true" in overrides)


@pytest.mark.parametrize(("text", "message"), [
    (None, "nothing.yaml: cannot be read: No such file or directory"), ("a: [", "is no YAML: "),
    ("- a\n- b\n", "must hold KEY: VALUE lines, not list"),
])  # fmt: skip
def test_what_is_no_file_of_settings(text, message, tmp_path):
    path = tmp_path / ("nothing.yaml" if text is None else "wrong.yaml")
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config([f"config={path}"])
    assert str(error.value).startswith(f"config={path}: ") and message in str(error.value)
    path.write_text("")
    assert overrides_of(path) == [] and load_config([f"config={path}"]) == load_config()


def test_mistakes_in_a_file_are_told_as_any(tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text("modle: small\noptim: {lr: -1}\n")
    with pytest.raises(ConfigError, match="modle=small: unknown key; did you mean model"):
        load_config([f"config={path}"])
