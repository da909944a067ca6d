"""The names of the experts' implementations, apart from them: settings name one without importing torch."""

from typing import Literal

Impl = Literal["auto", "torch", "mixed", "triton"]
