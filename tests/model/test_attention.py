import math

import pytest
import torch

from sieve.model.attention import Attention
from sieve.model.context import Context
from sieve.model.rope import rotate


def build(model, config, window=None):
    torch.manual_seed(1)
    return Attention(model, config, window)


def by_hand(layer, x, context, window):
    """One query at a time, in fp64."""
    heads = lambda y, n: y.unflatten(-1, (n, -1)).double()  # noqa: E731
    q, k, v = heads(layer.q_proj(x), 4), heads(layer.k_proj(x), 2), heads(layer.v_proj(x), 2)
    if not isinstance(layer.q_norm, torch.nn.Identity):
        q, k = (y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() for y in (q, k))
    q, k = rotate(q, context.rotation), rotate(k, context.rotation)
    out = torch.zeros(len(x), 4, v.shape[-1], dtype=torch.float64)
    doc, position = context.packing.doc, context.packing.position
    for t in range(len(x)):
        seen = [s for s in range(t + 1) if doc[s] == doc[t] and (window is None or position[t] - position[s] < window)]
        for h in range(4):
            p = torch.softmax(k[seen, h // 2] @ q[t, h] / math.sqrt(q.shape[-1]), 0)
            out[t, h] = p @ v[seen, h // 2]
    if layer.output_gate is not None:
        out *= torch.sigmoid(layer.output_gate(x)).double()[..., None]
    return out.flatten(1).float() @ layer.o_proj.weight.T


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("qk_norm, output_gate", [(False, False), (True, True)])
def test_against_a_computation_by_hand(model, attention, pack, window, qk_norm, output_gate):
    config, cfg = attention("full", qk_norm=qk_norm, output_gate=output_gate), model()
    layer = build(cfg, config, window)
    x = torch.randn(23, 32)
    context = Context.of(cfg, config, pack([9, 1, 13]))
    with torch.no_grad():
        out, aux = layer(x, context=context)
        torch.testing.assert_close(out, by_hand(layer, x, context, window), rtol=1e-4, atol=1e-6)
    assert aux == {} and out.std() > 1e-3


def test_no_nsa_layer_needs_no_slots(model, attention, pack):
    context = Context.of(model(), attention("full"), pack([20]))
    assert context.slots is None and context.slot_rotation is None
