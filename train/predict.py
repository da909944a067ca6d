"""How long a training step takes, on paper: a roofline over a step's parts, from the figures of sieve.train.gpus.

A product takes its FLOPs at the rate of large products or its bytes at the bandwidth, whichever is longer; attention what
its kernels took where they were measured, scaled by visible pairs; all else its bytes at a share of the bandwidth. The parts
have the names of sieve.train.breakdown, so that the two can stand side by side.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sieve.kernels.moe.api import AUTO_ON_CUDA
from sieve.kernels.nsa.geometry import Geometry
from sieve.model.config import AttentionConfig, LossConfig, ModelConfig
from sieve.model.count import compressed_pairs, count_parameters, flops_per_token, selected_pairs, window_pairs
from sieve.model.memory import FLOAT, expert_rows, loss_chunk, loss_impl
from sieve.model.stack import Checkpointing
from sieve.train.breakdown import LOSS, OPTIMIZER, OTHER
from sieve.train.gpus import ATTENTION, Gpu, Measured

SIZE = 2  # bytes of bf16, which all figures are for
BRANCHES = ("compression, forward", "selection, forward", "window, forward")
LOGIT_BYTES = {"liger": 6, "compiled": 8, "torch": 38}  # read and written of a logit between its three products
MATMUL, COMMUNICATION, EXPERTS = "matmul", "communication", "experts"

ASSUMPTIONS = (
    "bf16, one document a row; layers fused by torch.compile, also where it is off (at zero=3)",
    "the GPU never waits: neither for the host nor for data; small kernels take no time of their own",
    "NSA on random inputs, whose neighbouring queries share no selection: trained models are faster",
    "attention at other shapes and lengths than the measured ones by their nearest, scaled by visible pairs; at shorter and "
    "longer rows at the rate of the nearest length",
    "collectives at the full rate of the links, overlapping with nothing; gradients reduced in fp32, at stages 0 and 1 once a "
    "step, at 2 and 3 once a micro-batch; evaluation, checkpoints and logging left out",
)


@dataclass(frozen=True)
class Setup:
    """One phase of a run on its machine. seq_len and micro_batch as in RunConfig; micro_batches: a rank's in a step.

    bus: bytes/s a rank sends in a collective.
    """

    model: ModelConfig
    attention: AttentionConfig
    loss: LossConfig
    vocab: int
    seq_len: int
    micro_batch: int
    micro_batches: int
    mode: Checkpointing
    stage: int
    ranks: int
    gpu: Gpu
    bus: float

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.seq_len * self.micro_batch


def step_seconds(setup: Setup) -> dict[str, float]:
    """Seconds of one optimizer step by part; they add up to the step."""
    model, gpu, T = setup.model, setup.gpu, setup.tokens
    total: Counter[str] = Counter()
    for index, kind in enumerate(setup.attention.layer_types(model.num_layers)):
        if kind == "nsa" and setup.seq_len <= setup.attention.dense_len:
            kind = "dense"
        total.update(_layer(setup, kind, index))
    total.update(_loss(setup))
    parameters = count_parameters(model, setup.attention, setup.vocab).total
    embedding = SIZE * (5 * T * model.hidden_size + 2 * setup.vocab * model.hidden_size)  # look-up, and its sorted sums
    last_norm = 7 * SIZE * T * model.hidden_size
    # To fp32 and added to what earlier micro-batches left: 2 + 4, then 4 + 4 + 4 bytes.
    total[OTHER] += (embedding + last_norm + 18 * parameters) / _elementwise(gpu)
    step = Counter({part: setup.micro_batches * seconds for part, seconds in total.items()})
    share = parameters / setup.ranks if setup.stage else parameters
    # The norm; AdamW's weights, gradients and moments read and all but gradients written; rounded weights; gradients zeroed.
    touched = share * (4 + 28 + 4 + SIZE) + FLOAT * (share if setup.stage >= 2 else parameters)
    step[OPTIMIZER] += touched / gpu.bandwidth.value
    if setup.ranks > 1:
        step[COMMUNICATION] += sent_bytes(setup, parameters) / setup.bus
    return {part: seconds for part, seconds in step.items() if seconds}


def sent_bytes(setup: Setup, parameters: int) -> float:
    """What a rank sends in a step, in rings: a gather or a scatter of n bytes sends n * (ranks - 1) / ranks, a sum over
    ranks that all get twice that. Gradients are fp32; stages 0 to 2 sum them so, stage 3 scatters them and gathers the
    weights for forward, for backward, and for what is computed again."""
    grads, weights = FLOAT * parameters, SIZE * parameters
    if setup.stage == 3:
        gathers = 2 if setup.mode == "none" else 3
        volume = setup.micro_batches * (grads + gathers * weights)
    else:
        sums = setup.micro_batches if setup.stage == 2 else 1
        volume = sums * 2 * grads + (weights if setup.stage else 0)
    return volume * (setup.ranks - 1) / setup.ranks


def bus_rate(gpu: Gpu, ranks: int, per_node: int, network: float) -> float:
    """Bytes/s of a ring over `ranks` GPUs: within a node a GPU's NVLink; between nodes a node's adapters together, since
    each carries a share of every ring (NCCL's rings, one an adapter), if they are slower."""
    return gpu.nvlink.value if ranks <= per_node else min(gpu.nvlink.value, per_node * network)


def attention_seconds(part: str, shape: tuple[int, int, int, int], seq_len: int, geometry: Geometry) -> float:
    """Of one document through one layer: the course over lengths of the reference, times what the nearest shape differs."""
    having = [measured for measured in ATTENTION if part in measured.ms]
    reference = having[0]
    near = min(having, key=lambda m: _distance(m.shape, shape))
    usual = AttentionConfig().geometry()  # of all measurements

    def rate(measured: Measured, tokens: int) -> float:
        return _pairs_flops(part, measured.shape, tokens, usual) / measured.ms[part][tokens]

    def course(tokens: int) -> float:
        return _between(tokens, {n: rate(reference, n) for n in reference.ms[part]})

    ratio = _between(seq_len, {n: rate(near, n) / course(n) for n in near.ms[part]})
    return 1e-3 * _pairs_flops(part, shape, seq_len, geometry) / (course(seq_len) * ratio)


def _distance(a: Sequence[int], b: Sequence[int]) -> float:
    group, size = (x[0] / x[1] for x in (a, b)), (x[2] + x[3] for x in (a, b))
    return sum(abs(math.log2(p / q)) for p, q in (tuple(group), tuple(size)))


def _between(tokens: int, values: dict[int, float]) -> float:
    """Linear in the logarithm of the length, the nearest one's outside."""
    known = sorted(values)
    if tokens <= known[0]:
        return values[known[0]]
    for low, high in zip(known, known[1:]):
        if tokens <= high:
            share = math.log(tokens / low) / math.log(high / low)
            return (1 - share) * values[low] + share * values[high]
    return values[known[-1]]


def _pairs_flops(part: str, shape: tuple[int, int, int, int], seq_len: int, geometry: Geometry) -> float:
    """What a part's time is proportional to at a given rate: the forward's FLOPs over visible pairs; gates: elements."""
    heads, _, dim_qk, dim_v = shape
    branch = part.split(",")[0]
    if branch == "gates":
        return heads * dim_v * seq_len
    if branch == "scores and top-n":
        return 2 * heads * dim_qk * max(1, compressed_pairs(seq_len, geometry))
    pairs = {
        "compression": compressed_pairs, "selection": selected_pairs,
        "window": lambda n, g: window_pairs(n, g.window_size),
    }.get(branch, lambda n, g: window_pairs(n, n))
    return 2 * heads * (dim_qk + dim_v) * max(1, pairs(seq_len, geometry))


def _attention(setup: Setup, kind: str) -> Counter[str]:
    """Of a layer and micro-batch, both directions."""
    model, found = setup.model, Counter()
    shape = model.num_heads, model.num_kv_heads, model.head_dim_qk, model.head_dim_v
    if kind == "nsa":
        named = [(part, part) for part in (
            *BRANCHES, "scores and top-n, forward", "window, backward", "selection, backward", "compression, backward",
            "gates, backward",
        )]
    else:
        kernel = "window" if kind == "window" else "varlen"
        if kind == "full" and setup.attention.dense_impl == "cudnn":
            kernel = "cudnn"
        named = [(f"{kernel}, {way}", f"full attention, {way}") for way in ("forward", "backward")]
    for part, name in named:
        found[name] += setup.micro_batch * attention_seconds(part, shape, setup.seq_len, setup.attention.geometry())
    return found


def _elementwise(gpu: Gpu) -> float:
    return gpu.bandwidth.value * gpu.elementwise.value


def _product(setup: Setup, tokens: int, inputs: int, outputs: int) -> float:
    """Of [tokens, inputs] x [inputs, outputs] in bf16; the two products of its backward take as long each."""
    size = SIZE * (tokens * inputs + inputs * outputs + tokens * outputs)
    return max(2 * tokens * inputs * outputs / setup.gpu.matmul.value, size / setup.gpu.bandwidth.value)


def _layer(setup: Setup, kind: str, index: int) -> Counter[str]:
    """Of a layer and micro-batch: forward, backward, and what the mode of checkpointing has computed again."""
    model, T, gpu = setup.model, setup.tokens, setup.gpu
    hidden, heads, groups = model.hidden_size, model.num_heads, model.num_kv_heads
    dim_qk, dim_v = model.head_dim_qk, model.head_dim_v
    sets = 3 if kind == "nsa" and not setup.attention.share_kv else 1
    widths = [heads * dim_qk, *sets * [groups * dim_qk, groups * dim_v]]
    if kind == "nsa":
        widths.append(3 * heads)
    elif setup.attention.output_gate and kind != "dense":
        widths.append(heads)
    products = [(hidden, width) for width in widths] + [(heads * dim_v, hidden)]
    rotated = heads * dim_qk + min(sets, 2) * groups * dim_qk
    # Elements a token: norms, residual sums and RoPE; the backward of a norm also adds up its readers' gradients.
    forward, backward = 9 * hidden + 2 * rotated, (len(widths) + 3 + 5) * hidden + 2 * rotated
    if kind == "nsa":
        chunks = 2 * groups * (dim_qk + dim_v)
        forward, backward = forward + chunks + 6 * heads, backward + 2 * chunks + 9 * heads
    rest: Counter[str] = Counter()
    back: Counter[str] = Counter()
    if model.moe is not None and index >= model.moe.first_dense_layers:
        inner = model.moe.num_shared * model.moe.expert_size
        _experts(setup, rest, back)
    else:
        inner = model.intermediate_size
    if inner:
        products += [(hidden, inner), (hidden, inner), (inner, hidden)]
        forward, backward = forward + 3 * inner, backward + 5 * inner
    rest[MATMUL] += (seconds := sum(_product(setup, T, *sizes) for sizes in products))
    back[MATMUL] += 2 * seconds
    if kind == "nsa":
        one = setup.attention.model_copy(update={"type": "nsa", "layers": None})
        phi = flops_per_token(model, one, setup.vocab, setup.seq_len)["phi"] / model.num_layers * T / gpu.matmul.value
        rest[MATMUL] += phi / 3
        back[MATMUL] += 2 * phi / 3
    rest[OTHER] += SIZE * T * forward / _elementwise(gpu)
    back[OTHER] += SIZE * T * backward / _elementwise(gpu)
    attention = _attention(setup, kind)
    total = attention + rest + back
    if setup.mode != "none":
        total += rest
    if setup.mode in ("block", "full"):
        total += Counter({part: seconds for part, seconds in attention.items() if part.endswith("forward")})
    if kind == "nsa" and (setup.mode == "full" or not setup.attention.save_outputs):
        total["gates, backward"] += sum(attention[branch] for branch in BRANCHES)  # there their outputs are made again
    return total


def _experts(setup: Setup, forward: Counter[str], backward: Counter[str]) -> None:
    """The routed experts of a layer and micro-batch: products, router, and the copies and sums between them."""
    model, moe, gpu, T = setup.model, setup.model.moe, setup.gpu, setup.tokens
    rows, hidden, width = expert_rows(model, T), model.hidden_size, moe.expert_size
    product = 2 * rows * 3 * hidden * width / gpu.grouped.value
    router = max(
        2 * T * hidden * moe.num_experts / gpu.fp32.value,
        (SIZE + 2 * FLOAT) * T * hidden / gpu.bandwidth.value,  # x is copied to fp32 for it
    )
    rate = gpu.bandwidth.value * gpu.routing[AUTO_ON_CUDA if moe.impl == "auto" else moe.impl].value
    forward[EXPERTS] += product
    backward[EXPERTS] += 2 * product
    forward[MATMUL] += router
    backward[MATMUL] += 2 * router
    forward[OTHER] += SIZE * (3 * rows * hidden + T * hidden + 3 * rows * width) / rate
    backward[OTHER] += SIZE * (3 * rows * hidden + T * hidden + 6 * rows * width) / rate


def _loss(setup: Setup) -> dict[str, float]:
    """Of a micro-batch: three products of the output layer, passes over the logits, and its gradient in fp32 for each
    chunk."""
    T, hidden, vocab = setup.tokens, setup.model.hidden_size, setup.vocab
    chunks = math.ceil(T / loss_chunk(setup.loss, vocab, hidden, T))
    size = LOGIT_BYTES[loss_impl(setup.loss)] * T * vocab + 2 * FLOAT * chunks * vocab * hidden
    return {LOSS: 3 * _product(setup, T, hidden, vocab) + size / setup.gpu.bandwidth.value}
