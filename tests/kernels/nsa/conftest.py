"""What kernel tests share: the device they run on, poisoned memory, and plain dense evaluations of the operator."""

import os

import pytest
import torch

from sieve.kernels.nsa.layout import CompressedSlots, Packing


@pytest.fixture
def device():
    return torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")


@pytest.fixture
def poison(monkeypatch):
    """Memory from torch.empty and its kin is NaN or the largest integer, so that whatever a kernel leaves out shows."""

    def poisoned(make):
        def made(*args, **kwargs):
            x = make(*args, **kwargs)
            with torch.no_grad():  # it may be a leaf
                return x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max)

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def pack(lengths, device="cpu") -> Packing:
    cu = torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0).int()
    return Packing.of(cu, sum(lengths), max(lengths))


def relative_errors(x, exact) -> tuple[float, float]:
    """Error of x in norm, and its largest, both relative to `exact` in float64."""
    difference = x.double() - exact.double()
    norm = exact.double().norm().item() or 1.0
    largest = exact.double().abs().max().item() or 1.0
    return difference.norm().item() / norm, difference.abs().max().item() / largest


def attend(q, k, v, visible, scale):
    """q [T, H, D], k, v [N, Hkv, D], visible [T, Hkv or 1, N]: plain PyTorch in q's dtype, rows that see nothing 0."""
    kv = k.shape[1]
    s = torch.einsum("tkgd,nkd->tkgn", q.unflatten(1, (kv, -1)), k) * scale
    s = s.masked_fill(~visible[:, :, None], float("-inf"))
    p = torch.softmax(s.masked_fill(~visible.any(-1)[:, :, None, None], 0.0), -1) * visible[:, :, None]
    return torch.einsum("tkgn,nkd->tkgd", p, v).flatten(1, 2)


def window_mask(packing: Packing, width: int):
    t = torch.arange(packing.total_tokens, device=packing.doc.device)
    back = t[:, None] - t
    return ((packing.doc[:, None] == packing.doc) & (back >= 0) & (back < width))[:, None]


def nsa_masks(packing: Packing, geometry, indices):
    """Which compressed slots, selected tokens and window tokens each query sees, [T, Hkv or 1, keys]."""
    doc, position = packing.doc, packing.position
    slots = CompressedSlots.of(packing, geometry.kernel_size, geometry.kernel_stride)
    seen = (doc[:, None] == doc[slots.start]) & slots.valid
    seen &= slots.position + geometry.kernel_size - 1 <= position[:, None]
    chosen = (indices[:, :, :, None] == (position // geometry.block_size)).any(2)
    causal = window_mask(packing, packing.total_tokens)
    return seen[:, None], chosen & causal, window_mask(packing, geometry.window_size)


def dense_nsa(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, packing, geometry, indices, scale):
    """The operator for given indices, dense, differentiable, in q's dtype: exact in float64, a yardstick in bf16."""
    seen, chosen, near = nsa_masks(packing, geometry, indices)
    branches = (k_cmp, v_cmp, seen), (k_slc, v_slc, chosen), (k_win, v_win, near)
    return sum(gates[:, :, i, None] * attend(q, *branch, scale) for i, branch in enumerate(branches))


@pytest.fixture
def dense():
    """The functions above, as a namespace: test modules cannot import one another."""
    from types import SimpleNamespace

    return SimpleNamespace(
        pack=pack, relative_errors=relative_errors, attend=attend, window_mask=window_mask, nsa_masks=nsa_masks,
        nsa=dense_nsa,
    )
