"""What kernel tests share: the device they run on, poisoned memory, and plain dense evaluations of the operator."""

import pytest
import torch

from sieve.kernels.nsa.layout import CompressedSlots, Packing


def pack(lengths, device="cpu") -> Packing:
    cu = torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0).int()
    return Packing.of(cu, sum(lengths), max(lengths))


def relative_errors(x, exact) -> tuple[float, float]:
    """Error of x in norm, and its largest, both relative to `exact` in float64."""
    if not exact.numel():
        return 0.0, 0.0
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


def draw_nsa(tokens, heads, kv_heads, d_qk, d_v, geometry, device="cpu", dtype=torch.float32, seed=0):
    """The operator's eight inputs, random, as leaves."""
    g = torch.Generator(device).manual_seed(seed)
    slots = tokens // geometry.kernel_stride
    shapes = [(tokens, heads, d_qk)] + [(n, kv_heads, d) for n in (slots, tokens, tokens) for d in (d_qk, d_v)]
    inputs = [torch.randn(s, generator=g, device=device, dtype=dtype) for s in shapes]
    inputs.append(torch.rand(tokens, heads, 3, generator=g, device=device).to(dtype))  # in bf16 one in 256 would be 0
    return [x.requires_grad_() for x in inputs]


def cotangent(inputs, seed=1):
    """A gradient of the operator's output, in its shape and dtype."""
    q, v = inputs[0], inputs[4]
    g = torch.Generator(q.device).manual_seed(seed)
    return torch.randn(*q.shape[:2], v.shape[2], generator=g, device=q.device).to(q.dtype)


def run_nsa(inputs, packing, geometry, do=None, **options):
    """The Triton operator: out, indices, and the gradients of the inputs."""
    from sieve.kernels.nsa import triton_ops

    scale = inputs[0].shape[2] ** -0.5
    out, indices = triton_ops.nsa_attention(*inputs, packing, geometry, scale=scale, **options)
    return out.detach(), indices, torch.autograd.grad(out, inputs, cotangent(inputs) if do is None else do)


def plain_nsa(inputs, packing, geometry, indices, dtype, do=None):
    """The dense operator in `dtype`, for given indices: out, and the gradients of the inputs."""
    do = (cotangent(inputs) if do is None else do).to(dtype)
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = dense_nsa(*inputs, packing, geometry, indices, inputs[0].shape[2] ** -0.5)
    return out.detach(), torch.autograd.grad(out, inputs, do)


NAMES = "q k_cmp v_cmp k_slc v_slc k_win v_win gates".split()


def check_accuracy(got, exact, yardstick, names=("out", *NAMES), floor=0.0):
    """The rule: in norm and at its largest, an error at most twice that of plain PyTorch in the same dtype (or floor)."""
    for name, mine, want, theirs in zip(names, got, exact, yardstick, strict=True):
        assert mine.isfinite().all(), name
        for ours, plain in zip(relative_errors(mine, want), relative_errors(theirs, want)):
            assert ours <= max(2 * plain, floor), (name, ours, plain)


def check_nsa(inputs, packing, geometry, floor=0.0, skip=(), **options):
    """run_nsa, its results held to the rule, its selection to the importances in float64."""
    got, indices, grads = run_nsa(inputs, packing, geometry, **options)
    check_operator_selection(indices, inputs, packing, geometry)
    exact, yardstick = (plain_nsa(inputs, packing, geometry, indices, d) for d in (torch.float64, inputs[0].dtype))
    sides = ((x, *(g for n, g in zip(NAMES, gs) if n not in skip)) for x, gs in ((got, grads), exact, yardstick))
    check_accuracy(*sides, names=("out", *(n for n in NAMES if n not in skip)), floor=floor)
    return got, indices, grads


def importance(q, k, lse, packing, geometry, scale):
    """float64 [T, Hkv, blocks]: importance, +inf where forced, -inf where not a candidate; and the candidates' count."""
    doc, position, heads = packing.doc.long(), packing.position.long(), k.shape[1]
    first = packing.cu_seqlens.long()[doc] // geometry.kernel_stride
    slot = torch.arange(k.shape[0], device=q.device) - first[:, None]  # of the document
    seen = (slot >= 0) & (slot * geometry.kernel_stride + geometry.kernel_size - 1 <= position[:, None])
    s = torch.einsum("tkgd,ckd->tkgc", q.double().unflatten(1, (heads, -1)), k.double()) * scale
    p = (s - lse.double().unflatten(1, (heads, -1))[..., None]).exp().masked_fill(~seen[:, None, None], 0.0).sum(2)
    p = p if k.shape[0] else p.new_zeros(*p.shape[:2], 1)
    current = position // geometry.block_size
    block = torch.arange(int(current.max()) + 1, device=q.device)
    rank = torch.zeros(*p.shape[:2], len(block), dtype=torch.float64, device=q.device)
    before = geometry.kernel_size // geometry.kernel_stride - 1
    for m, weight in enumerate(geometry.overlap):
        at = first[:, None] + block * (geometry.block_size // geometry.kernel_stride) - before + m
        inside = (at >= first[:, None]) & (at < k.shape[0])
        index = at.clamp(0, max(k.shape[0] - 1, 0))[:, None].expand(-1, heads, -1)
        rank += weight * p.gather(2, index) * inside[:, None]
    forced = (block < geometry.init_blocks) | (block > current[:, None] - geometry.local_blocks)
    rank.masked_fill_(forced[:, None], float("inf"))
    return rank.masked_fill_((block > current[:, None])[:, None], float("-inf")), current + 1


def check_selection(indices, q, k, lse, packing, geometry, scale, tolerance):
    """Ascending candidates, all forced blocks, none chosen that is lighter by more than rounding than one left out."""
    rank, candidates = importance(q, k, lse, packing, geometry, scale)
    count = candidates.clamp(max=geometry.topk)[:, None]
    place = torch.arange(geometry.topk, device=q.device)
    index = indices.long()
    assert ((index >= 0) == (place < count[..., None])).all() and (index[index < 0] == -1).all()
    assert ((index[..., 1:] > index[..., :-1]) | (index[..., 1:] < 0)).all()
    assert (index < candidates[:, None, None]).all()
    chosen = torch.zeros(*rank.shape[:2], rank.shape[2] + 1, dtype=torch.bool, device=q.device)
    chosen = chosen.scatter(2, index.masked_fill(index < 0, rank.shape[2]), True)[..., :-1]
    least = rank.masked_fill(~chosen, float("inf")).amin(-1)
    left = rank.masked_fill(chosen, float("-inf")).amax(-1)
    assert (left <= least * (1 + tolerance) + 1e-30).all()  # below it weights vanish in fp32


@torch.no_grad()
def check_operator_selection(indices, inputs, packing, geometry, tolerance=1e-4):
    """check_selection of the operator's indices; products of halves are exact, their sums are in fp32."""
    q, k = inputs[:2]
    scale, groups = q.shape[2] ** -0.5, k.shape[1]
    seen = nsa_masks(packing, geometry, indices)[0]
    s = torch.einsum("tkgd,nkd->tkgn", q.double().unflatten(1, (groups, -1)), k.double()) * scale
    lse = s.masked_fill(~seen[:, :, None], float("-inf")).logsumexp(-1).flatten(1)
    check_selection(indices, q, k, lse, packing, geometry, scale, tolerance)


@pytest.fixture
def dense():
    """The functions above, as a namespace: test modules cannot import one another."""
    from types import SimpleNamespace

    return SimpleNamespace(
        pack=pack, relative_errors=relative_errors, attend=attend, window_mask=window_mask, nsa_masks=nsa_masks,
        nsa=dense_nsa, check_selection=check_selection, check_accuracy=check_accuracy,
    )


@pytest.fixture
def op():
    """What tests of the whole operator share."""
    from types import SimpleNamespace

    return SimpleNamespace(
        names=NAMES, draw=draw_nsa, cotangent=cotangent, run=run_nsa, plain=plain_nsa, check=check_nsa,
        check_selection=check_operator_selection,
    )
