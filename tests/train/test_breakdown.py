"""Names as profiles on an H100 and an H200 have them, and a small trace worked out by hand."""

import pytest

from sieve.train.breakdown import breakdown, classify, classify_operator


@pytest.mark.parametrize(("kernel", "category"), [
    ("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "matmul"),
    ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel", "matmul"),
    ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>(...)", "matmul"),
    ("void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cutlass::gemm::GroupProblemShape<...>>>", "experts"),
    ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 32, 4, ...>>(Flash_fwd_params)",
     "full attention, forward"),
    ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>(Flash_bwd_params)", "full attention, backward"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x128x128_4x1x1_kernel0_0",
     "full attention, forward"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_5_64x64x128_1x1x1_kernel0_0",
     "full attention, backward"),
    ("liger_cross_entropy_kernel", "loss"),
    ("element_mul_kernel", "loss"),
    ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<..., FusedAdamMathFunctor<float>>", "optimizer"),
    ("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
    ("triton_red_fused__fused_rms_norm__to_copy_add_mul_2", "norm and elementwise"),
    ("triton_poi_fused_mul_silu_4", "norm and elementwise"),
    ("Memcpy DtoD (Device -> Device)", "norm and elementwise"),
    ("_select", "scores and top-n, forward"),
    ("_combine_backward", "gates, backward"),
    ("_add_partials", "selection, backward"),
    ("runs_forward", "attention of an unknown branch"),
])
def test_kernels(kernel, category):
    assert classify(kernel) == category


def test_a_range_decides_over_a_name():
    assert classify("runs_forward", ["sieve::step", "sieve::forward", "sieve::compression, forward"]) == "compression, forward"
    assert classify("nvjet_tst_1", ["sieve::step", "sieve::forward", "sieve::loss"]) == "loss"
    assert classify("Memcpy DtoD", ["sieve::step", "sieve::optimizer"]) == "optimizer"
    assert classify("nvjet_tst_1", ["sieve::step", "sieve::forward", "other"]) == "matmul"
    assert classify_operator("aten::mm") == "matmul"


def event(cat, name, ts, dur, tid=1, **args):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


def test_a_trace_of_a_gpu():
    """Two steps of 100 us: data until 20, launches, kernels that overlap on two streams, and a gap."""
    events = []
    for start in (0, 100):
        events += [
            event("user_annotation", "sieve::step", start, 100),
            event("user_annotation", "sieve::data", start, 20),
            event("user_annotation", "sieve::forward", start + 20, 30),
            event("user_annotation", "sieve::selection, forward", start + 25, 10),
            event("cuda_driver", "cuLaunchKernelEx", start + 26, 1, correlation=start + 1),
            event("cuda_runtime", "cudaLaunchKernel", start + 40, 1, correlation=start + 2),
            event("kernel", "_forward", start + 30, 20, tid=7, correlation=start + 1),  # 30 to 50
            event("kernel", "nvjet_tst", start + 40, 30, tid=8, correlation=start + 2),  # 40 to 70, the later one
        ]
    found = breakdown({"traceEvents": events})
    assert found.device == "cuda" and found.steps == 2 and found.step_seconds == pytest.approx(100e-6)
    wanted = {"selection, forward": 10e-6, "matmul": 30e-6, "data wait": 20e-6, "idle": 40e-6}
    assert found.parts == pytest.approx(wanted)
    assert sum(found.parts.values()) == pytest.approx(found.step_seconds)
    assert found.table().splitlines()[-1].split() == ["step", "0.100", "100.0%"]


def test_the_last_step_ends_when_the_device_has_computed_it():
    """The host has launched all of a step at 10 us; what it launches afterwards is not the step's."""
    events = [event("user_annotation", "sieve::step", 0, 10)]
    for launched, start, name in ((5, 10, "nvjet_tst"), (6, 40, "nvjet_tst"), (30, 70, "other")):
        events += [
            event("cuda_runtime", "cudaLaunchKernel", launched, 1, correlation=launched),
            event("kernel", name, start, 30, tid=7, correlation=launched),
        ]
    found = breakdown({"traceEvents": events})
    assert found.step_seconds == pytest.approx(70e-6)
    assert found.parts == pytest.approx({"matmul": 60e-6, "data wait": 0, "idle": 10e-6})
    assert [kernel[0] for kernel in found.kernels] == ["nvjet_tst"]


def test_operators_of_a_cpu_nest():
    events = [
        event("user_annotation", "sieve::step", 0, 100), event("cpu_op", "aten::linear", 10, 50),
        event("cpu_op", "aten::copy_", 20, 10), event("cpu_op", "aten::mm", 30, 30), event("cpu_op", "aten::add", 90, 30),
    ]
    found = breakdown({"traceEvents": events})
    assert found.device == "cpu"
    assert found.parts == pytest.approx({"matmul": 40e-6, "norm and elementwise": 20e-6, "data wait": 0, "idle": 40e-6})


def test_without_a_step_there_is_nothing_to_tell():
    with pytest.raises(ValueError, match="no range sieve::step"):
        breakdown({"traceEvents": []})
