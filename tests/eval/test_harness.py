"""The lm-eval adapter beside the harness's own HFLM on one exported full-attention model, on small local tasks of the
paper's kinds: multiple choice, generation with stop strings, log-likelihood of a word, and of whole texts."""

import json
import random

import pytest
import torch

pytest.importorskip("lm_eval")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sieve.eval.config import HarnessConfig
from sieve.eval.harness import PAPER_TASKS, adapter, run_harness
from sieve.eval.load import load_folder
from sieve.model.config import AttentionConfig, ModelConfig
from sieve.model.decoder import Decoder
from sieve.model.init import initialize
from sieve.model.llama import to_llama

WORDS = ["red", "green", "blue", "two", "three", "apple", "pear", "sky"]
TASKS = {
    "choice": {
        "output_type": "multiple_choice", "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "generation": {
        "output_type": "generate_until", "doc_to_text": "Q: {{question}}\nA:", "doc_to_target": "{{word}}",
        "generation_kwargs": {"until": ["\n", "Q:"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "lastword": {
        "output_type": "loglikelihood", "doc_to_text": "{{question}}", "doc_to_target": " {{word}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "wholetext": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{long}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of task files with their data."""
    folder, rng = tmp_path_factory.mktemp("tasks"), random.Random(0)
    with (folder / "data.jsonl").open("w") as file:
        for _ in range(8):
            long = " ".join(rng.choices(WORDS, k=60))
            choices = rng.sample(WORDS, 4)
            file.write(json.dumps({
                "question": " ".join(rng.choices(WORDS, k=rng.randint(2, 12))), "choices": choices,
                "gold": rng.randrange(4), "word": rng.choice(WORDS), "long": long,
            }) + "\n")
    for name, settings in TASKS.items():
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}}}
        tree = {"task": name, "test_split": "test", "num_fewshot": 0, **data, **settings}
        (folder / f"{name}.yaml").write_text(json.dumps(tree))  # JSON is YAML
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A random full-attention model as plain Llama, with a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1} | {letter: i + 2 for i, letter in enumerate(alphabet)}
    merges = [(a, b) for a, b in (("r", "e"), ("e", "n"), ("a", "p"), ("b", "l"), ("\u0120", "t"))]
    vocab |= {a + b: len(vocab) + i for i, (a, b) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    model = ModelConfig(name="m", num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, head_dim_qk=8, head_dim_v=8,
                        intermediate_size=48, init_std=0.25)
    decoder = Decoder(model, AttentionConfig(type="full"), len(vocab))
    initialize(decoder, 0)
    to_llama(decoder, max_position_embeddings=200, bos_token_id=0, eos_token_id=1).save_pretrained(folder)
    return folder


def ours(exported, **changes):
    loaded = load_folder(exported, torch.device("cpu"), torch.float32)
    return adapter(loaded, **(dict(max_length=200, bos=False, seed=0, batch_tokens=500) | changes))


def evaluate(lm, folder):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return simple_evaluate(model=lm, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, log_samples=True)


def test_agrees_with_the_harness_s_own_wrapper(exported, tasks):
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=str(exported), device="cpu", dtype="float32", batch_size=4, max_length=200)
    want, got = evaluate(theirs, tasks), evaluate(ours(exported), tasks)
    for task in TASKS:
        for key, value in want["results"][task].items():
            if isinstance(value, float):
                assert got["results"][task][key] == pytest.approx(value, rel=1e-4), (task, key)
        for a, b in zip(want["samples"][task], got["samples"][task]):
            if task == "generation":
                assert a["resps"] == b["resps"]
            elif task != "wholetext":
                for x, y in zip(a["resps"], b["resps"]):
                    assert float(y[0][0]) == pytest.approx(float(x[0][0]), abs=1e-3) and str(x[0][1]) == str(y[0][1])
    replies = {str(sample["resps"]) for sample in got["samples"]["generation"]}
    assert len(replies) > 2  # it says different things


def test_the_task_of_the_suite(exported, tasks):
    loaded = load_folder(exported, torch.device("cpu"), torch.float32)
    config = HarnessConfig(include_path=str(tasks), offline=True, limit=3, max_length=150)
    result = run_harness(loaded, config, 0, 400)
    assert {row["task"] for row in result.tables["lm-evaluation-harness"]} == set(TASKS)
    assert 0 <= result.metrics["eval/choice_acc"] <= 1 and result.metrics["eval/wholetext_bits_per_byte"] > 0
    one = run_harness(loaded, config.model_copy(update={"tasks": ("choice",), "bos": False}), 0, 400)
    assert {row["task"] for row in one.tables["lm-evaluation-harness"]} == {"choice"}


def test_bos_and_cutting(exported):
    lm = ours(exported, bos=True)
    assert lm.tok_encode("red")[0] == 0 and lm.tok_encode("red", add_special_tokens=False)[0] != 0
    short = ours(exported, max_length=10)
    tokens = short.tok_encode("red green blue two three")
    (cut,), (tail,) = (short._loglikelihood_tokens([(None, tokens[:-2][-n:], tokens[-2:])]) for n in (100, 9))
    assert cut == pytest.approx(tail)


def test_users_mistakes(exported, tasks):
    loaded = load_folder(exported, torch.device("cpu"), torch.float32)
    local = HarnessConfig(include_path=str(tasks), offline=True)
    with pytest.raises(ValueError, match="there is no task choise; near are choice"):
        run_harness(loaded, local.model_copy(update={"tasks": ("choise",)}), 0, 400)
    with pytest.raises(ValueError, match="leaves no room for its question in harness.max_length=20"):
        run_harness(loaded, local.model_copy(update={"tasks": ("generation",), "max_length": 20}), 0, 400)
    with pytest.raises(ValueError, match="harness.include_path=/nowhere is no folder"):
        run_harness(loaded, HarnessConfig(include_path="/nowhere", offline=True), 0, 400)


def test_data_out_of_reach(exported, tmp_path):
    settings = TASKS["choice"] | {"task": "far", "dataset_path": "json", "dataset_kwargs": {"data_files": "/nowhere/x.json"}}
    (tmp_path / "far.yaml").write_text(json.dumps(settings | {"test_split": "train"}))
    loaded = load_folder(exported, torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="the data of far cannot be had: .*nowhere.*give tasks of your own"):
        run_harness(loaded, HarnessConfig(include_path=str(tmp_path), offline=True), 0, 400)


@pytest.mark.slow  # the harness's own index of 14,000 names
def test_the_paper_s_names_exist():
    from lm_eval.tasks import TaskManager

    assert set(PAPER_TASKS) <= set(TaskManager().all_tasks)
