"""The shape of NSA's sparse pattern: plain integers, checked once."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Geometry:
    """Block and window sizes in tokens, arXiv 2502.11089: l, d, l', n (forced blocks included), and w.

    Raises ValueError, naming the field, its value and what is allowed, when d does not divide l or l', l > l', the
    forced blocks do not fit into topk, or a size is not positive.
    """

    kernel_size: int
    kernel_stride: int
    block_size: int
    topk: int
    init_blocks: int
    local_blocks: int
    window_size: int

    def __post_init__(self) -> None:
        for f in fields(self):
            least = 0 if f.name == "init_blocks" else 1
            if getattr(self, f.name) < least:
                raise ValueError(f"{f.name}={getattr(self, f.name)} must be at least {least}")
        l, d, lp = self.kernel_size, self.kernel_stride, self.block_size
        if l % d:
            raise ValueError(f"kernel_stride={d} must divide kernel_size={l}")
        if lp % d:
            raise ValueError(f"kernel_stride={d} must divide block_size={lp}")
        if l > lp:
            raise ValueError(f"kernel_size={l} must be at most block_size={lp}")
        if self.topk < self.init_blocks + self.local_blocks:
            raise ValueError(
                f"topk={self.topk} must be at least init_blocks + local_blocks = "
                f"{self.init_blocks} + {self.local_blocks}, since the forced blocks count towards it"
            )

    @property
    def overlap(self) -> tuple[int, ...]:
        """Equation 9's weights: entry m is the overlap, in strides, of a selection block with its m-th compressed block.

        Selection block j meets the compressed blocks i = j * block_size / d - (l/d - 1) + m, for
        m = 0 .. block_size/d + l/d - 2; l=32, d=16, block_size=64 gives (1, 2, 2, 2, 1).
        """
        a, b = self.block_size // self.kernel_stride, self.kernel_size // self.kernel_stride
        return tuple(min(m + 1, b, a, a + b - 1 - m) for m in range(a + b - 1))
