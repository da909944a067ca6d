"""What a decoder is made of: frozen, validated settings. Every default of the model stands here and nowhere else."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from sieve.kernels.moe.impl import Impl
from sieve.kernels.nsa.geometry import Geometry

AttentionType = Literal["full", "nsa", "window"]


class Config(BaseModel):
    """Base of every settings model: immutable, and an unknown key is an error rather than a silent no-op."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class RopeScaling(Config):
    """YaRN (arXiv 2309.00071): stretch a model trained at `original_seq_len` tokens by `factor`."""

    type: Literal["yarn"] = "yarn"
    factor: float = Field(gt=1.0)
    original_seq_len: int = Field(gt=0)
    beta_fast: float = Field(32.0, gt=0)
    beta_slow: float = Field(1.0, gt=0)


class RopeConfig(Config):
    theta: float = Field(10_000.0, gt=0)
    scaling: RopeScaling | None = None


class MoEConfig(Config):
    """DeepSeekMoE (arXiv 2401.06066): shared experts always run, routed experts by top-k, no token is dropped.

    `balance="bias"` is the auxiliary-loss-free rule of arXiv 2408.15664; `"aux"` the sequence-independent
    load-balance loss of Switch (arXiv 2101.03961) with `aux_coef`; `"both"` the bias beside that loss, as arXiv
    2412.19437 has it (there by sequence; here over a micro-batch). `z_loss_coef` is the router z-loss of ST-MoE (arXiv
    2202.08906, equation 5), beside any of them. With `num_groups`, a token's experts come from its best `top_groups` groups
    of neighbouring experts only (arXiv 2412.19437, section 2.1.2): a group is what one node would hold.
    """

    num_experts: int = Field(gt=0)
    top_k: int = Field(gt=0)
    expert_size: int = Field(gt=0, description="intermediate size of one expert")
    num_shared: int = Field(0, ge=0)
    first_dense_layers: int = Field(1, ge=0)
    score: Literal["sigmoid", "softmax"] = "sigmoid"
    normalize_top_k: bool = True
    routed_scale: float = Field(1.0, gt=0)
    balance: Literal["bias", "aux", "both", "none"] = "bias"
    bias_update: Literal["sign", "proportional", "quantile"] = Field("sign", description=(
        "the bias's step: to which side, by how much of the mean load, or to where the step's scores would be spread evenly"
    ))
    bias_update_rate: float = Field(1e-3, ge=0, description=(
        "size of a step; quantile: weight of the last step's estimate, at most 1, and 1 where it is not set"
    ))
    bias_tokens: int = Field(8192, gt=0, description="quantile: tokens of a step, evenly spaced, that the bias is taken from")
    bias_settle: int = Field(0, ge=0, description=(
        "quantile: so many first steps end with a micro-batch of the beginnings of all their rows going forward, to find the "
        "bias from scores of the weights that the next step has"
    ))
    aux_coef: float = Field(1e-2, ge=0)
    z_loss_coef: float = Field(0.0, ge=0, description="router z-loss: mean square of the logits' log-sum-exp")
    num_groups: int = Field(1, gt=0, description="equal groups of neighbouring experts; 1: no limit")
    top_groups: int = Field(1, gt=0, description="groups that one token's experts may come from")
    impl: Impl = Field("auto", description="of the experts' products and copies: see docs/moe.md")

    @model_validator(mode="after")
    def _top_k_fits(self) -> MoEConfig:
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k={self.top_k} is more than num_experts={self.num_experts}; choose top_k <= num_experts"
            )
        if self.expert_size % 8:
            raise ValueError(_not_eight("expert_size", self.expert_size))
        return self

    @model_validator(mode="before")
    @classmethod
    def _whole_weight_by_default(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("bias_update") == "quantile":
            return {"bias_update_rate": 1.0} | values
        return values

    @model_validator(mode="after")
    def _rate_is_a_weight(self) -> MoEConfig:
        if self.bias_update == "quantile" and not 0 < self.bias_update_rate <= 1:
            raise ValueError(
                f"bias_update_rate={self.bias_update_rate} with bias_update=quantile is the weight of the last estimate in an "
                "average; choose more than 0 and at most 1"
            )
        return self

    @model_validator(mode="after")
    def _settles_by_quantile(self) -> MoEConfig:
        if self.bias_settle and not (self.bias_update == "quantile" and self.balance in ("bias", "both")):
            raise ValueError(
                f"bias_settle={self.bias_settle} has no meaning with balance={self.balance} and "
                f"bias_update={self.bias_update}; choose bias_update=quantile with balance=bias or both, or bias_settle=0"
            )
        return self

    @model_validator(mode="after")
    def _groups_fit(self) -> MoEConfig:
        if self.num_experts % self.num_groups:
            allowed = [n for n in range(1, self.num_experts + 1) if self.num_experts % n == 0]
            raise ValueError(
                f"num_groups={self.num_groups} does not divide num_experts={self.num_experts}; it may be one of {allowed}"
            )
        if self.top_groups > self.num_groups:
            raise ValueError(
                f"top_groups={self.top_groups} is more than num_groups={self.num_groups}; choose top_groups <= num_groups"
            )
        reach = self.top_groups * (self.num_experts // self.num_groups)
        if self.top_k > reach:
            raise ValueError(
                f"top_k={self.top_k} is more than the {reach} experts that top_groups={self.top_groups} of "
                f"num_groups={self.num_groups} groups hold; raise top_groups, or choose top_k <= {reach}"
            )
        return self


def _not_eight(name: str, value: int) -> str:
    return (
        f"{name}={value} is not divisible by 8; torch's grouped matrix product wants rows of whole 16 bytes, "
        f"so that {value // 8 * 8 or 8} or {(value // 8 + 1) * 8} would do"
    )


class ModelConfig(Config):
    """A pre-norm decoder. Sizes are in elements; `intermediate_size` is the width of the dense SwiGLU."""

    name: str
    num_layers: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_dim_qk: int = Field(gt=0)
    head_dim_v: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    moe: MoEConfig | None = None
    rope: RopeConfig = RopeConfig()
    norm_eps: float = Field(1e-5, gt=0)
    tie_embeddings: bool = False
    init_std: float = Field(0.02, gt=0)

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.num_heads % self.num_kv_heads:
            allowed = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            raise ValueError(
                f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.num_kv_heads}; "
                f"num_kv_heads may be one of {allowed}"
            )
        if self.head_dim_qk % 2:
            raise ValueError(f"head_dim_qk={self.head_dim_qk} is odd; RoPE rotates pairs, so it must be even")
        if self.moe is not None and self.hidden_size % 8:
            raise ValueError(_not_eight("hidden_size", self.hidden_size))
        return self


class AttentionConfig(Config):
    """How the layers attend. `type` holds for every layer unless `layers` names one type a layer.

    `layers` is a pattern, repeated until it covers the model: [full, nsa] alternates; its length must divide the
    number of layers. The NSA names are those of arXiv 2502.11089's public ports: kernel_size l, kernel_stride d,
    block_size l', topk n with the forced blocks included, window_size w (also the width of `window` layers).

    dense_len, as MiniCPM4 calls it: an NSA layer whose micro-batch holds no document of more than dense_len tokens is
    a full-attention layer on the selection branch's projections, without gates; see docs/nsa.md.
    """

    type: AttentionType = "nsa"
    layers: tuple[AttentionType, ...] | None = None
    qk_norm: bool = False
    output_gate: bool = Field(False, description="sigmoid gate per head and token on full and window layers' output")
    impl: Literal["auto", "triton", "sdpa", "reference"] = Field("auto", description=(
        "of NSA; sdpa and reference are plain PyTorch, for comparisons, the one by fused attention under masks, the other by "
        "dense scores in fp32"
    ))
    dense_impl: Literal["auto", "cudnn", "triton"] = Field("auto", description=(
        "of full and window attention; cudnn: on a GPU, full, in micro-batches whose documents are all of one length; triton: "
        "slower, and the same bits in every run"
    ))
    window_size: int = 512
    kernel_size: int = 32
    kernel_stride: int = 16
    block_size: int = 64
    topk: int = 16
    init_blocks: int = 1
    local_blocks: int = 2
    phi: Literal["mlp", "linear", "mean"] = "mlp"
    phi_hidden: int | None = Field(None, gt=0, description="width of phi's MLP; null: twice its output's head dim")
    compressed_rope: bool = Field(True, description="rotate a compressed key at its block's first position")
    share_kv: bool = Field(False, description="one K/V projection for the three branches")
    save_outputs: bool = Field(
        True, description="keep the branches' outputs for the backward; false: compute them again there (Triton only)"
    )
    dense_len: int = Field(0, ge=0, description="full attention where no document is longer, in tokens; 0: nowhere")

    @field_validator("layers", mode="before")
    @classmethod
    def _not_empty(cls, value: object) -> object:
        if isinstance(value, (list, tuple)) and not value:
            raise ValueError("layers=[] names no layer; give null or at least one of full, nsa, window")
        return value

    @model_validator(mode="after")
    def _legal_geometry(self) -> AttentionConfig:
        self.geometry()
        return self

    def geometry(self) -> Geometry:
        """The shape of the sparse pattern, as the kernels take it."""
        return Geometry(
            kernel_size=self.kernel_size, kernel_stride=self.kernel_stride, block_size=self.block_size, topk=self.topk,
            init_blocks=self.init_blocks, local_blocks=self.local_blocks, window_size=self.window_size,
        )

    def layer_types(self, num_layers: int) -> tuple[AttentionType, ...]:
        """The type of each layer, the pattern in `layers` repeated; ValueError when it does not fit."""
        pattern = self.layers or (self.type,)
        if num_layers % len(pattern):
            raise ValueError(
                f"attention.layers has {len(pattern)} entries, which does not divide model.num_layers={num_layers}; "
                "give one type a layer, or a pattern whose length divides the number of layers"
            )
        return pattern * (num_layers // len(pattern))


class LossConfig(Config):
    """z_loss: coefficient of the squared log-partition (PaLM, arXiv 2204.02311, section 5), added per labelled token.

    impl: "torch" (any device), "liger" (liger-kernel's fused Triton kernels, CUDA only) or "compiled" (as torch, a chunk's
    softmax and slope by torch.compile; unlike liger it never waits for the GPU); "auto" is compiled on CUDA, else torch.
    """

    z_loss: float = Field(0.0, ge=0)
    chunk_size: int | None = Field(None, gt=0, description=(
        "tokens whose logits exist at once (torch and compiled; liger has its own); null: 1024 with torch, with compiled so "
        "many that they are 2^28 logits"
    ))
    impl: Literal["auto", "torch", "liger", "compiled"] = "auto"
