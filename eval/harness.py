"""lm-evaluation-harness (EleutherAI, extra `eval`) on a Decoder: its tasks, our forward, cache and packing."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sieve.eval.config import HarnessConfig, Sampling
from sieve.eval.examples import forward_of, predictor
from sieve.eval.generate import generate_text
from sieve.eval.load import Loaded

if TYPE_CHECKING:
    from sieve.eval.runner import Result

# Table 1 and section 4.3 of arXiv 2502.11089, by the harness's names.
PAPER_TASKS = (
    "mmlu", "mmlu_pro", "cmmlu", "bbh", "gsm8k", "minerva_math", "drop", "mbpp", "humaneval", "longbench",
)
GENERATED = 256  # tokens where a task does not say, as the harness's own models have it


def adapter(model: Loaded, *, max_length: int, bos: bool, seed: int, batch_tokens: int) -> Any:
    """An lm_eval LM of the model. bos: begin every text with it. Raises ValueError without lm-eval or a tokenizer."""
    _check_needs(model)
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    text = model.text
    predict = predictor(forward_of(model.decoder), model.decoder.embed.weight.device)

    class SieveLM(TemplateLM):
        """Log-likelihoods from one packed forward without padding; generation with the cache."""

        tokenizer_name = model.name

        @property
        def eot_token_id(self) -> int:
            return text.eos_id

        @property
        def prefix_token_id(self) -> int:
            return text.eos_id if text.bos_id is None else text.bos_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            begin = bos and add_special_tokens is not False and text.bos_id is not None
            return ([text.bos_id] if begin else []) + text.encode(string)

        def _loglikelihood_tokens(self, requests: Sequence, disable_tqdm: bool = False, **kwargs: Any) -> list:
            found: list[tuple[float, bool] | None] = [None] * len(requests)
            inputs = [(context + continuation)[-(max_length + 1) :] for _, context, continuation in requests]
            order = sorted(range(len(requests)), key=lambda i: -len(inputs[i]))
            for batch in _batches(order, [len(x) for x in inputs], batch_tokens):
                texts = [inputs[i][:-1] for i in batch]
                sizes = [min(len(requests[i][2]), len(inputs[i]) - 1) for i in batch]
                places = [range(len(own) - size, len(own)) for own, size in zip(texts, sizes)]
                for i, size, logits in zip(batch, sizes, predict(texts, places)):
                    wanted = torch.tensor(inputs[i][len(inputs[i]) - size :], device=logits.device)
                    own = torch.log_softmax(logits.float(), -1).gather(-1, wanted[:, None])
                    found[i] = (own.sum().item(), bool((logits.argmax(-1) == wanted).all()))
            return found

        def loglikelihood_rolling(self, requests: Sequence, disable_tqdm: bool = False) -> list[float]:
            windows, owner = [], []
            for number, request in enumerate(requests):
                tokens = self.tok_encode(request.args[0], add_special_tokens=False)
                for window in get_rolling_token_windows(
                    token_list=tokens, prefix_token=self.prefix_token_id, max_seq_len=max_length, context_len=1
                ):
                    windows.append((None, *make_disjoint_window(window)))
                    owner.append(number)
            totals = [0.0] * len(requests)
            for number, (loss, _) in zip(owner, self._loglikelihood_tokens(windows)):
                totals[number] += loss
            return totals

        def generate_until(self, requests: Sequence, disable_tqdm: bool = False) -> list[str]:
            found: list[str | None] = [None] * len(requests)
            groups: dict[str, list[int]] = {}
            for i, request in enumerate(requests):
                groups.setdefault(repr(sorted(request.args[1].items(), key=str)), []).append(i)
            for members in groups.values():
                self._generate([requests[i].args for i in members], members, found)
            return found

        def _generate(self, calls: list[tuple[str, dict]], members: list[int], found: list[str | None]) -> None:
            settings = normalize_gen_kwargs(dict(calls[0][1]), GENERATED)
            room, until = settings["max_gen_toks"], settings.get("until") or []
            if room >= max_length:
                raise ValueError(
                    f"a task generates {room} tokens, which leaves no room for its question in harness.max_length={max_length}"
                )
            drawn = settings.get("do_sample")
            sampling = Sampling(
                max_tokens=room, temperature=(settings.get("temperature") or 1.0) if drawn else 0.0,
                top_p=settings.get("top_p") or 1.0 if drawn else 1.0, seed=seed,
            )
            prompts = [self.tok_encode(call[0])[-(max_length - room) :] for call in calls]
            order = sorted(range(len(calls)), key=lambda i: -len(prompts[i]))
            stop = [until] if isinstance(until, str) else [word for word in until if word]
            for batch in _batches(order, [len(p) + room for p in prompts], batch_tokens):
                texts = generate_text(
                    model.decoder, lambda ids: ids, text.decode, [prompts[i] for i in batch], sampling, stop=stop,
                    stop_ids=[text.eos_id],
                )
                for i, own in zip(batch, texts):
                    found[members[i]] = own

    return SieveLM()


def _batches(order: Sequence[int], sizes: Sequence[int], limit: int) -> Iterator[list[int]]:
    """`order` in groups of at most `limit` together; a larger one goes alone."""
    batch: list[int] = []
    for i in order:
        if batch and sum(sizes[j] for j in batch) + sizes[i] > limit:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _check_needs(model: Loaded) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("the harness needs the package lm-eval: pip install 'sieve-lm[eval]'")
    if model.text is None or model.text.eos_id is None:
        raise ValueError(f"{model.name} has no tokenizer with an end-of-text token, which the harness needs")


def check_harness(model: Loaded, config: HarnessConfig) -> None:
    """ValueError for what can be told without the harness's index of tasks, which takes it seconds."""
    _check_needs(model)
    if config.offline and config.include_path is None:
        raise ValueError("harness.offline=true takes the tasks of harness.include_path alone; give it too")
    if config.include_path is not None and not Path(config.include_path).is_dir():
        raise ValueError(f"harness.include_path={config.include_path} is no folder")


def run_harness(model: Loaded, config: HarnessConfig, seed: int, batch_tokens: int) -> Result:
    """The tasks of `config`, by the harness. ValueError, with near names, for a task that it does not know, and for one
    that runs generated code without harness.run_code."""
    from sieve.eval.runner import Result

    check_harness(model, config)
    lm = adapter(
        model, max_length=config.max_length or model.seq_len or 4096, bos=config.bos, seed=seed, batch_tokens=batch_tokens
    )
    import difflib

    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=config.include_path, include_defaults=not config.offline)
    names = config.tasks or (manager.all_tasks if config.offline else PAPER_TASKS)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            raise ValueError(f"harness.tasks: there is no task {name}" + (f"; near are {', '.join(near)}" if near else ""))
    if config.run_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # what the metric of these tasks asks for, besides the harness itself
    try:
        found = simple_evaluate(
            model=lm, tasks=list(names), task_manager=manager, num_fewshot=config.num_fewshot, limit=config.limit,
            bootstrap_iters=1000, random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
            confirm_run_unsafe_code=config.run_code, log_samples=False,
        )
    except ValueError as error:
        if "unsafe" in str(error).lower():
            raise ValueError(f"{error} Here: harness.run_code=true") from error
        raise
    except OSError as error:  # huggingface_hub's and datasets' are of this kind
        raise ValueError(
            f"the data of {', '.join(names)} cannot be had: {error}; run it where the Hub can be reached (or its cache, "
            "HF_HOME, has them), or give tasks of your own by harness.include_path and harness.offline=true"
        ) from error
    rows, metrics = [], {}
    for name, values in found["results"].items():
        for key, value in values.items():
            metric, _, rule = key.partition(",")
            if not rule or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = values.get(f"{metric}_stderr,{rule}")
            error = error if isinstance(error, float) and not math.isnan(error) else None
            rows.append({"task": name, "metric": metric, "filter": rule, "value": float(value), "stderr": error})
            metrics[f"eval/{name}_{metric}" + ("" if rule == "none" else f"_{rule}")] = float(value)
    versions = {name: found["versions"].get(name) for name in names}
    return Result("harness", {"lm-evaluation-harness": rows}, metrics, extra={"versions": versions})
