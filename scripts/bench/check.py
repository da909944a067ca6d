"""Correctness before speed: the operator in bf16 against the reference in float64, for the same selection."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import torch

from sieve.kernels.nsa import reference
from sieve.kernels.nsa.geometry import Geometry
from sieve.scripts.bench.cases import Case, Shape, draw
from sieve.scripts.bench.timing import reason

NAMES = ("out", "dq", "dk_cmp", "dv_cmp", "dk_slc", "dv_slc", "dk_win", "dv_win", "dgates")
LIMIT = 1.5e-2  # bf16 operands err by 1e-3 to 1e-2 in norm
TOKENS, DOCUMENTS = 1600, 3  # of a checked row
SAME = 0.99  # share of the selection that must be the reference's; the rest are near ties


def check(case: Case) -> dict[str, float]:
    """Relative errors in norm of the output and of every gradient, and the share of equal selections.

    Raises RuntimeError where one is out of bounds: no speed is reported of a wrong result.
    """
    from sieve.kernels.nsa.triton_ops import nsa_attention

    packing, geometry, s = case.packing, case.geometry, case.scale
    out, indices = nsa_attention(*case.inputs, packing, geometry, scale=s)
    got = (out, *torch.autograd.grad(out, case.inputs, case.do))
    exact = [x.detach().double().requires_grad_() for x in case.inputs]
    q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = exact
    o_cmp, lse = reference.compressed_attention(q, k_cmp, v_cmp, packing, geometry, scale=s)
    chosen = reference.select_blocks(q, k_cmp, lse, packing, geometry, scale=s)
    o_slc, _ = reference.selected_attention(q, k_slc, v_slc, indices, packing, geometry, scale=s)
    o_win, _ = reference.window_attention(q, k_win, v_win, packing, geometry.window_size, scale=s)
    want = reference.combine(o_cmp, o_slc, o_win, gates)
    want = (want, *torch.autograd.grad(want, exact, case.do.double()))
    errors = {}
    for name, a, b in zip(NAMES, got, want):
        errors[name] = ((a.double() - b).norm() / b.norm()).item()
    same = (chosen[..., :, None] == indices[..., None, :]).any(-1).float().mean().item()
    wrong = {name: e for name, e in errors.items() if not e <= LIMIT}  # NaN is wrong too
    if wrong or not same >= SAME:
        raise RuntimeError(f"{case.shape}: errors over {LIMIT}: {wrong}; equal selections {same:.4f}, least {SAME}")
    return errors | {"same_selection": same}


def check_shape(shape: Shape, geometry: Geometry, kinds: list[str]) -> dict[str, dict[str, float] | str]:
    """`check` of a short row of each kind of inputs: its numbers, or what is wrong, in words."""
    found: dict[str, dict[str, float] | str] = {}
    for kind in kinds:
        try:
            found[kind] = check(draw(shape, TOKENS, geometry, kind == "structured", documents=DOCUMENTS))
        except Exception as error:  # a compiler's too: whatever it is, this shape is not to be timed
            found[kind] = reason(error)
    return found


def check_shapes(shapes: list[Shape], geometry: Geometry, kinds: list[str]) -> dict[Shape, dict[str, dict[str, float] | str]]:
    """`check_shape` of all, several in processes of their own: most of it is compilation, which the disk cache keeps, so
    that the kernels of all shapes are compiled at the same time and ready when they are measured."""
    if len(shapes) == 1:
        return {shapes[0]: check_shape(shapes[0], geometry, kinds)}
    workers = min(len(shapes), os.cpu_count() or 1, 8)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(check_shape, shape, geometry, kinds) for shape in shapes]
        return {shape: future.result() for shape, future in zip(shapes, futures)}
