"""What the command line takes, and what it answers to a mistake."""

from __future__ import annotations

import pytest

from sieve.train.mistakes import ConfigError
from sieve.train.overrides import config_groups, load_config

MISTAKES = [
    # unknown keys: the key, its value, the closest key
    ("topk=8", "topk=8: unknown key; did you mean attention.topk?"),
    ("atention.topk=8", "atention.topk=8: unknown key; did you mean attention.topk?"),
    ("atention=nsa", "atention=nsa: unknown key; did you mean attention?"),
    ("attention.top_k=8", "attention.top_k=8: unknown key; did you mean attention.topk?"),
    ("data.pathz=x", "data.pathz=x: unknown key; did you mean data.paths?"),
    ("stepz=3", "stepz=3: unknown key; did you mean steps?"),
    ("model.moe.qqqq=1", "model.moe.qqqq=1: unknown key; known are model.moe.num_experts, model.moe.top_k,"),
    ("hydra.job.chdir=true", "Hydra itself takes no settings here"),
    # unknown choices of a group
    ("model=smal", "model=smal: no such choice; did you mean model=small? "
     "there are 1b, base, dense-200m, moe-1b, nsa-27b, small, tiny"),
    ("zero=4", "zero=4: no such choice; there are 0, 1, 2, 3"),
    ("attention=nas", "attention=nas: no such choice; did you mean attention=nsa? there are full, nsa, window"),
    ("experiment=foo", "experiment=foo: no such choice; there are books-python-8k-32k, recall-8k, twin-cpu, twin-gpu"),
    ("model=null", "model=null: no such choice"),
    # types and values
    ("steps=ten", "steps=ten: must be a valid integer"),
    ("steps=0", "steps=0: must be greater than 0"),
    ("log.every=1.5", "log.every=1.5: must be a valid integer, got a number with a fractional part"),
    ("optim.clip=-1", "optim.clip=-1: must be greater than or equal to 0"),
    ("dtype=fp16", "dtype=fp16: must be 'fp32' or 'bf16'; did you mean bf16?"),
    ("attention.phi=conv", "attention.phi=conv: must be 'mlp', 'linear' or 'mean'"),
    ("attention.qk_norm=maybe", "attention.qk_norm=maybe: must be a valid boolean"),
    ("attention='[full,foo]'", "attention.layers[1]=foo: must be 'full', 'nsa' or 'window'"),
    ("optim.betas=[0.9]", "optim.betas[1]: is required"),
    ("optim.betas=[0.9,x]", "optim.betas[1]=x: must be a valid number"),
    ("checkpoint={every:5,keep:0}", "checkpoint.keep=0: must be greater than or equal to 1"),
    ("seed.x=1", "seed={x:1}: must be a valid integer"),
    ("model.rope.scaling.factor=2", "model.rope.scaling.original_seq_len: is required"),
    ("model.rope.scaling={factor:0.5,original_seq_len:9}", "model.rope.scaling.factor=0.5: must be greater than 1"),
    ("name=a/b", "name=a/b: must be a folder's name"),
    # what does not go together: every key in full
    ("attention.topk=1", "attention.topk=1 must be at least init_blocks + local_blocks = 1 + 2"),
    ("attention.kernel_size=24", "attention.kernel_stride=16 must divide attention.kernel_size=24"),
    ("attention.block_size=40", "attention.kernel_stride=16 must divide attention.block_size=40"),
    ("attention.block_size=16", "attention.kernel_size=32 must be at most attention.block_size=16"),
    ("attention.window_size=0", "attention.window_size=0 must be at least 1"),
    ("attention.layers=[]", "attention.layers=[] names no layer"),
    ("attention=[full,nsa,nsa]", "attention.layers has 3 entries, which does not divide model.num_layers=4"),
    ("model.num_heads=7", "model.num_heads=7 is not divisible by model.num_kv_heads=2; num_kv_heads may be one of [1, 7]"),
    ("model.head_dim_qk=31", "model.head_dim_qk=31 is odd"),
    ("model.moe.top_k=99", "model.moe.top_k=99 is more than model.moe.num_experts=8"),
    ("global_batch=10 micro_batch=4", "is not divisible by micro_batch=4; micro_batch may be one of 1, 2, 5, 10"),
    ("steps=10 tokens=1e6", "steps=10 and tokens=1000000 are both given; set one of them to null"),
    ("attention=nsa attention.dense_len=64 zero=2", "choose zero=0 or 1, or dense_len=0"),
    ("dtype=bf16 zero=0", "dtype=bf16 with zero.stage=0 keeps no fp32 master weights; choose zero=1, 2 or 3"),
    ("seq_len=16", "seq_len=16 is less than attention.kernel_size=32"),
    ("schedule.warmup=2000", "schedule.warmup=2000 steps is more than the run's 1000"),
    ("data.paths=[a]", "data.paths is given, but data.type=python reads no files; choose data=files"),
    # mixtures and phases
    ("data=books-python data.sources.books.wieght=2", "sources.books: SourceConfig has no key 'wieght'; did you mean weight"),
    ("data=books-python data.sources.book.weight=2", "data.sources.book has no type; did you mean data.sources.books? a new"),
    ("data.sources={x:{weight:1},code:{type:python}}", "data.sources.x has no type; there are code; a new source needs data."),
    ("data=books-python data.sources.books.weight=-2", "data.sources.books.weight=-2: must be greater than or equal to 0"),
    ("data=books-python data.max_bytes=3", "data.max_bytes=3 beside sources; it belongs to a source: data.sources.NAME.max"),
    ("data=books-python data.paths=txt", "data.paths=[txt] beside sources; it belongs to a source: data.sources.NAME.paths"),
    ("data=books-python data.sources.python.paths=txt", "data.sources.python.type=python reads no files, but paths is"),
    ("data=books-python data.sources.books.workers=3", "data.sources.books.workers=3: is set for the whole mixture"),
    ("data.packing=bestfit", "must be 'concatenate', 'best_fit' or 'document'; did you mean best_fit?"),
    ("data.phases=[{from_tokens:9,seqlen:64}]", "data.phases[0]: PhaseConfig has no key 'seqlen'; did you mean seq_len?"),
    ("data.phases=[{from_tokens:0}]", "data.phases[0].from_tokens=0: must be greater than 0"),
    ("data.phases=[{from_tokens:9},{from_tokens:9}]", "phases[1].from_tokens=9 does not come after phases[0].from_tokens=9"),
    ("data.phases=[{from_tokens:9,seq_len:8}]", "data.phases[0].seq_len=8 is less than attention.kernel_size=32"),
    ("data.phases=[{from_tokens:9,global_batch:6,micro_batch:4}]", "data.phases[0].global_batch=6 is not divisible by"),
    ("data=books-python data.phases=[{from_tokens:9,weights:{book:1}}]", "must name each of sources, which are books, python"),
    ("data.upsample={64:-1}", "data.upsample.64=-1: must be greater than or equal to 0"),
    ('tokenizer.special_tokens=["<s>"]', "tokenizer.special_tokens=[<s>]: '<s>' is a piece of every trained tokenizer already"),
    # numbers that pydantic takes for such
    ("optim.lr=inf", "optim.lr=inf: must be a finite number"),
    ("data=books-python data.sources.books.weight=inf", "data.sources.books.weight=inf: must be a finite number"),
    ("data.phases=[{from_tokens:9,global_batch:true}]", "data.phases[0].global_batch=true: must be a number, not a switch"),
    ("steps=true", "steps=true: must be a number, not a switch"),
    ("model.moe.top_k=true", "model.moe.top_k=true: must be a number, not a switch"),
    ("optim.betas=[0.9,1.0]", "optim.betas[1]=1: must be less than 1"),
    ("profile=yes", "profile=yes: must be true or false; one setting is profile.KEY=VALUE"),
    # syntax
    ("steps", "steps: is not KEY=VALUE"),
    ("steps==3", "steps==3: cannot be read as KEY=VALUE"),
    ("name=[a", "name=[a: cannot be read as KEY=VALUE; put lists and special characters in quotes"),
    ("seed=1,2", "seed=1,2: several values; start one run for each"),
    ("name=${nothing}", "name: Interpolation key 'nothing' not found"),
    ("~model.nothing", "model.nothing"),
    ("--foo", "--foo: unknown option"),
    ("--local_rank=0", "deepspeed --no_local_rank"),
]


@pytest.mark.parametrize(("given", "message"), MISTAKES, ids=[given for given, _ in MISTAKES])
def test_a_mistake_names_key_value_and_remedy(given, message):
    with pytest.raises(ConfigError) as error:
        load_config(given.replace("'", "").split(" "))
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_all_mistakes_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        load_config(["steps=0", "attention.phi=conv", "model.moe.top_k=0"])
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == [
        "steps=0", "model.moe.top_k=0", "attention.phi=conv",
    ]


def test_defaults_need_no_override():
    config = load_config()
    assert (config.name, config.total_steps, config.attention.type) == ("tiny-nsa-python", 1000, "nsa")


@pytest.mark.parametrize("given", [["profile=true", "profile.after=3"], ["profile.after=3", "profile=true"]], ids=" ".join)
def test_profile_as_a_switch_keeps_its_other_settings(given):
    found = load_config(["steps=20", *given]).profile
    assert found.enabled and found.after == 3


def test_an_environment_variable_that_is_not_set(monkeypatch):
    monkeypatch.delenv("SIEVE_NOWHERE", raising=False)
    with pytest.raises(ConfigError, match="SIEVE_NOWHERE") as error:
        load_config(["name=${oc.env:SIEVE_NOWHERE}"])
    assert "interpolated" not in str(error.value)


def test_groups_values_and_lists():
    config = load_config(
        ["attention=[full,nsa]", "zero=2", "model=small", "optim.betas=[0.8,0.9]", "+seed=7", "tokens=1e5", "dtype=bf16"]
    )
    assert config.attention.layer_types(4) == ("full", "nsa", "full", "nsa")
    assert (config.zero.stage, config.model.name, config.optim.betas, config.seed) == (2, "small", (0.8, 0.9), 7)
    assert config.name == "small-full+nsa-python" and config.total_steps == 13  # 8 rows of 1024 tokens a step


def test_experiment_sets_values_and_the_command_line_has_the_last_word():
    plain, preset = load_config(), load_config(["experiment=twin-cpu"])
    assert preset.attention.block_size != plain.attention.block_size
    mixed = load_config(["experiment=twin-cpu", "model=small", "attention=full", "attention.block_size=128"])
    assert (mixed.model.name, mixed.attention.type, mixed.attention.block_size) == ("small", "full", 128)
    assert mixed.steps == preset.steps
    assert load_config(["experiment=null"]) == load_config(["~experiment"]) == plain


def test_interpolation_between_given_keys():
    assert load_config(["seed=3", "name=run-${seed}"]).name == "run-3"


def test_groups_are_found_by_their_files():
    groups = config_groups()
    assert set(groups) >= {
        "model", "attention", "data", "tokenizer", "optim", "schedule", "zero", "eval", "logger", "experiment",
    }
    assert groups["zero"] == ["0", "1", "2", "3"] and "twin-cpu" in groups["experiment"]
