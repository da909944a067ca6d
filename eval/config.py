"""Settings of generation and evaluation: frozen, validated, every default here and nowhere else. No torch is imported."""

from __future__ import annotations

from pydantic import Field

from sieve.model.config import Config


class Sampling(Config):
    """temperature 0 takes the likeliest token (the lower id of equals). top_p (arXiv 1904.09751): draw from the fewest
    likeliest tokens whose probabilities reach it. Every text has a generator of its own, so that it does not depend on
    the others of its batch."""

    max_tokens: int = Field(256, gt=0, description="new tokens at most")
    temperature: float = Field(0.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = Field(0, ge=0, lt=2**63)
