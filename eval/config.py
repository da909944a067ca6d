"""Settings of generation and evaluation: frozen, validated, every default here and nowhere else. No torch is imported."""

from __future__ import annotations

import difflib
from typing import Any, Literal, get_origin

from pydantic import Field, ValidationInfo, field_validator

from sieve.model.config import Config


class Sampling(Config):
    """temperature 0 takes the likeliest token (the lower id of equals). top_p (arXiv 1904.09751): draw from the fewest
    likeliest tokens whose probabilities reach it. Every text has a generator of its own, so that it does not depend on
    the others of its batch."""

    max_tokens: int = Field(256, gt=0, description="new tokens at most")
    temperature: float = Field(0.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = Field(0, ge=0, lt=2**63)


class _Part(Config):
    """A part of the settings in which a single value is a list of one, as lengths=1024."""

    @field_validator("*", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any, info: ValidationInfo) -> Any:
        is_list = get_origin(cls.model_fields[info.field_name].annotation) is tuple
        return (value,) if is_list and isinstance(value, (str, int, float)) and not isinstance(value, bool) else value


class NeedleConfig(_Part):
    """A fact somewhere in much text, asked for at its end (needle in a haystack; the passkey of arXiv 2305.16300)."""

    lengths: tuple[int, ...] = Field((1024, 2048, 4096, 8192), description="tokens of the whole text, question included")
    depths: tuple[float, ...] = Field((0.0, 0.25, 0.5, 0.75, 1.0), description="where the fact stands: 0 first, 1 last")
    samples: int = Field(4, gt=0, description="texts a length and depth")
    digits: int = Field(5, gt=0, le=18, description="of the number to be found")
    keys: int = Field(4, gt=1, description="facts in the text of which one is asked for, in multikey")

    @field_validator("lengths")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or min(value) < 1:
            raise ValueError("must be token counts of at least 1")
        return value

    @field_validator("depths")
    @classmethod
    def _shares(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or min(value) < 0 or max(value) > 1:
            raise ValueError("must be shares between 0 (the beginning) and 1 (the end)")
        return value


class RecallConfig(_Part):
    """mqar: pairs of random tokens, then some keys again in another order (arXiv 2312.04927). copy: random tokens, a
    separator, the same tokens. induction: one pair of tokens in random ones, its first again at the end."""

    pairs: tuple[int, ...] = Field((4, 16, 64), description="key-value pairs of mqar, and as many queries")
    lengths: tuple[int, ...] = Field((64, 256, 1024), description="tokens to copy; tokens before induction's question")
    samples: int = Field(16, gt=0, description="sequences a size")

    @field_validator("pairs", "lengths")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or min(value) < 2:
            raise ValueError("must be counts of at least 2")
        return value


class LossConfig(_Part):
    """The loss on documents, by position and by the document's length."""

    source: tuple[str, ...] = Field((), description="text, JSON lines or parquet files; none: the run's validation text")
    max_tokens: int | None = Field(200_000, gt=0, description="how much of it; null: all")
    seq_len: int | None = Field(None, gt=0, description="longest piece of a document; null: as in training")


class HealthConfig(_Part):
    """NSA's inner life, and its loss with something changed, on documents of the loss task."""

    tokens: int = Field(8192, gt=0, description="of the probe batch")
    larger_topk: tuple[int, ...] = Field((), description="block counts to try instead of topk; none: twice and four times")


SyntheticTask = Literal["needle", "multikey", "passkey", "mqar", "copy", "induction"]


class HarnessConfig(_Part):
    """lm-evaluation-harness (extra `eval`) through sieve.eval.harness."""

    tasks: tuple[str, ...] = Field((), description="names of its tasks; none: those of the NSA paper")
    include_path: str | None = Field(None, description="folder of task files of your own; with offline, the only ones")
    offline: bool = Field(False, description="only tasks of include_path, found at once, without its own index")
    num_fewshot: int | None = Field(None, ge=0, description="examples before a question; null: as the task says")
    limit: int | None = Field(None, gt=0, description="questions of a task; null: all")
    max_length: int | None = Field(None, gt=1, description="tokens a text is cut to, from its left; null: seq_len")
    bos: bool = Field(True, description="begin every text with bos, as in training; moves scores")
    run_code: bool = Field(False, description="let humaneval and mbpp run what the model wrote, on this machine")


TASKS = ("loss", "needle", "multikey", "passkey", "mqar", "copy", "induction", "health", "switches", "harness")
NEEDLES = ("needle", "multikey", "passkey")
NSA_TASKS = ("health", "switches")
TEXT_TASKS = ("loss", *NSA_TASKS)  # these cannot do without documents
SUITES: dict[str, tuple[str, ...]] = {
    "standard": ("loss", "needle", "mqar", "copy", "induction"),
    "recall": ("mqar", "copy", "induction"),
    "needle": ("needle", "multikey", "passkey"),
    "nsa": ("loss", "health", "switches"),
    "paper": ("harness",),
    "all": ("loss", "needle", "multikey", "passkey", "mqar", "copy", "induction", "health", "switches"),
}


class SuiteConfig(Config):
    """What `sieve eval` takes."""

    suite: tuple[str, ...] = Field(SUITES["standard"], description="a suite's name, or a list of tasks")
    out: str | None = Field(None, description="folder of the results; null: report/eval in a run's folder, else eval-NAME")
    seed: int = Field(0, ge=0)
    batch_tokens: int = Field(16_384, gt=0, description="tokens of a forward; one text longer than that goes alone")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 on a GPU, else fp32")
    runs_dir: str = "runs"
    needle: NeedleConfig = NeedleConfig()
    recall: RecallConfig = RecallConfig()
    loss: LossConfig = LossConfig()
    health: HealthConfig = HealthConfig()
    harness: HarnessConfig = HarnessConfig()

    @field_validator("suite", mode="before")
    @classmethod
    def _named(cls, value: object) -> object:
        if isinstance(value, str):
            return SUITES.get(value, (value,))
        if not isinstance(value, (list, tuple)):
            return value
        # In a list "needle" is the task: else it could not be had without the others of its suite.
        return tuple(task for name in value for task in ((name,) if name in TASKS else SUITES.get(name, (name,))))

    @field_validator("suite")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError(f"names no task; there are {', '.join((*SUITES, *TASKS))}")
        for task in value:
            if task not in TASKS:
                near = difflib.get_close_matches(task, (*TASKS, *SUITES), n=1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join((*SUITES, *TASKS))}"
                raise ValueError(f"{task} is no suite and no task; {hint}")
        return tuple(dict.fromkeys(value))
