"""The machine code of the Triton kernels, compiled for sm_80 and sm_90: no GPU is needed.

No kernel spills registers, none needs more shared memory than its target has, and those that multiply do so on tensor
cores. With ``--registers FILE`` each test adds what its kernel takes to a file (docs/registers.md is made of it).
"""

from __future__ import annotations

import re

import pytest
import torch

from headstart import _library
from judges.prefill_index import every_entry
from triton_testing import compile_launch, main_loop

pytest.importorskip("triton", reason="triton is not installed")
FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
by_capability = pytest.mark.parametrize("capability", [80, 90])


def tensor_cores(capability: int) -> str:
    return "wgmma.mma_async" if capability == 90 else "mma.sync"


# --- sparse_attention, merge_attention -------------------------------------------------------------------------------


def attention_modules():
    from headstart.triton import block_lists, sparse_attention

    return sparse_attention, block_lists, sparse_attention.decode


@pytest.mark.parametrize(
    "capability, d, block, columns, window",
    [(80, 64, 64, True, None), (80, 128, 64, False, None), (80, 256, 64, False, None), (80, 128, 128, True, 99)]
    + [(90, 64, 64, False, None), (90, 128, 128, True, None), (90, 256, 64, False, None), (90, 128, 128, True, 99)],
)
def test_sparse_attention(capability, d, block, columns, window, monkeypatch, check_resources):
    from headstart.triton import sparse_attention as kernels

    def call():
        nk, capacity = (512, 8) if window is None else (16384, 128)  # rows long enough to be sorted
        q, k = (torch.empty(1, heads, n, d, dtype=BFLOAT16) for heads, n in ((4, 512), (2, nk)))
        rows = 512 // block
        index = [torch.zeros(shape, dtype=torch.int32) for shape in ((1, 1, rows), (1, 1, rows, capacity))]
        index += [torch.zeros(shape, dtype=torch.int32) for shape in ((1, 1, 1), (1, 1, 1, 100)) if columns]
        kernels.sparse_attention(q, k, k, *index, block_q=block, block_k=block, window=window)

    binary = compile_launch(attention_modules(), monkeypatch, "sparse_attention_kernel", capability, call)
    assert tensor_cores(capability) in binary.asm["ptx"], "no tensor cores in it"
    case = f"head dim {d}, blocks of {block}{', columns' if columns else ''}{', a window' if window else ''}"
    check_resources(binary, "sparse_attention_kernel", capability, case)


@by_capability
@pytest.mark.parametrize("d", [64, 128, 256])
def test_split_attention(d, capability, monkeypatch, check_resources):
    from headstart.triton import sparse_attention as kernels

    def call():
        q, k = torch.empty(1, 8, 1, d, dtype=BFLOAT16), torch.empty(1, 2, 8192, d, dtype=BFLOAT16)
        shapes = (1, 2, 1), (1, 2, 1, 64), (1, 2, 1), (1, 2, 1, 1000)
        kernels.sparse_attention(q, k, k, *(torch.zeros(shape, dtype=torch.int32) for shape in shapes))

    for name in ("split_attention_kernel", "merge_splits_kernel"):
        binary = compile_launch(attention_modules(), monkeypatch, name, capability, call)
        assert name.startswith("merge") or "mma.sync" in binary.asm["ptx"], "no tensor cores in it"
        check_resources(binary, name, capability, f"decode, head dim {d}")


@pytest.mark.slow
@by_capability
@pytest.mark.parametrize("rest", [False, True], ids=["blocks alone", "columns, window, kv_start"])
@pytest.mark.parametrize(
    "d, dtype, nq, block",
    [(64, BFLOAT16, 512, 128), (96, BFLOAT16, 512, 64), (128, BFLOAT16, 512, 64)]
    + [(128, BFLOAT16, 512, 128), (192, BFLOAT16, 512, 64), (256, BFLOAT16, 512, 64)]
    + [(128, FLOAT32, 512, 64), (256, FLOAT32, 512, 64)]
    + [(d, dtype, nq, 64) for d in (128, 256) for dtype in (BFLOAT16, FLOAT32) for nq in (1, 8)],
)
def test_no_configuration_of_attention_spills(capability, d, dtype, nq, block, rest, monkeypatch, check_resources):
    from headstart.triton import sparse_attention as kernels

    def call():
        nk = 16384
        q, k = (torch.empty(1, heads, n, d, dtype=dtype) for heads, n in ((8, nq), (2, nk)))
        shapes = ((1, 1, -(-nq // block)), (1, 1, -(-nq // block), nk // block), (1, 1, 1), (1, 1, 1, 100))
        index = [torch.zeros(shape, dtype=torch.int32) for shape in shapes[: 4 if rest else 2]]
        given = dict(kv_start=torch.zeros(1, dtype=torch.int32), window=99) if rest else {}
        kernels.sparse_attention(q, k, k, *index, block_q=block, block_k=block, **given)

    name = "sparse_attention_kernel" if nq > kernels.decode.MAX_ROWS else "split_attention_kernel"
    binary = compile_launch(attention_modules(), monkeypatch, name, capability, call)
    # Of many float32 queries, ptxas spills a few words at 80 registers, with 255 allowed: it wants room for more warps.
    limit = 16 if dtype == FLOAT32 and nq > kernels.decode.MAX_ROWS else 0
    check_resources(binary, name, capability, stack=limit)


@by_capability
@pytest.mark.parametrize("name", ["covered_columns_kernel", "row_work_kernel", "merge_attention_kernel"])
def test_small_kernels_of_attention(name, capability, monkeypatch, check_resources):
    from headstart.triton import sparse_attention as kernels

    def call():
        x, k = (torch.empty(1, 4, n, 128, dtype=BFLOAT16) for n in (512, 8192))
        if name == "merge_attention_kernel":
            kernels.merge_attention(x, x[..., 0].float(), x, x[..., 0].float())
        else:
            shapes = (1, 1, 8), (1, 1, 8, 128), (1, 1, 1), (1, 1, 1, 100)
            kernels.sparse_attention(x, k, k, *(torch.zeros(shape, dtype=torch.int32) for shape in shapes))

    binary = compile_launch(attention_modules(), monkeypatch, name, capability, call)
    check_resources(binary, name, capability, "head dim 128")


# --- index builders --------------------------------------------------------------------------------------------------

BUILDERS = {
    "strided_score_kernel": "adaptive_block_index",
    "block_mass_kernel": "adaptive_block_index",
    "sampled_share_kernel": "adaptive_block_index",
    "select_kernel": "adaptive_block_index",
    "pool_mean_kernel": "block_topk_index",
    "pooled_score_kernel": "block_topk_index",
    "last_query_lse_kernel": "vertical_slash_index",
    "last_query_sums_kernel": "vertical_slash_index",
    "band_mass_kernel": "vertical_slash_index",
    "spread_bands_kernel": "vertical_slash_index",
}
BUILDER_ARGUMENTS = {"adaptive_block_index": (0.9,), "block_topk_index": (100,), "vertical_slash_index": (1000, 6096)}
BUILDER_OPTIONS = {"sampled_share_kernel": dict(samples=4)}
BUILDERS_THAT_MULTIPLY = (
    "strided_score_kernel",
    "sampled_share_kernel",
    "pooled_score_kernel",
    "last_query_lse_kernel",
    "last_query_sums_kernel",
)


@pytest.mark.parametrize("d", [128, 256])
@by_capability
@pytest.mark.parametrize("name", BUILDERS)
def test_index_builders(name, capability, d, monkeypatch, check_resources):
    from headstart.triton import block_select, prefill_index, vertical_slash

    if d != 128 and name not in (*BUILDERS_THAT_MULTIPLY, "pool_mean_kernel"):
        pytest.skip("the same for every head dim")
    builder = BUILDERS[name]
    q, k = torch.empty(1, 4, 8192, d, dtype=BFLOAT16), torch.empty(1, 2, 8192, d, dtype=BFLOAT16)

    def call():
        _library.triton_kernels[builder](q, k, *BUILDER_ARGUMENTS[builder], **BUILDER_OPTIONS.get(name, {}))

    binary = compile_launch([prefill_index, vertical_slash, block_select], monkeypatch, name, capability, call)
    if name in BUILDERS_THAT_MULTIPLY:
        assert tensor_cores(capability) in binary.asm["ptx"], "no tensor cores in it"
    check_resources(binary, name, capability, f"head dim {d}")


@by_capability
def test_selection_among_many_keys(capability, monkeypatch, check_resources):
    from headstart.triton import block_select

    def call():
        block_select.select(torch.empty(1, 1, 1, 2**17), 1000, **every_entry(2**17))

    binary = compile_launch([block_select], monkeypatch, "select_kernel", capability, call)
    check_resources(binary, "select_kernel", capability)


# --- centroid_lookup -------------------------------------------------------------------------------------------------

LOOKUPS = {
    "prefill": dict(nq=512, parents=None),
    "prefill, parents": dict(nq=512, parents=1300),
    "decode": dict(nq=1, parents=None),
    "decode, parents": dict(nq=1, parents=1300),
}
LOOKUPS_THAT_MULTIPLY = ("cluster_lse_kernel", "cluster_best_kernel")


@pytest.mark.parametrize("launch, d", [("prefill", 64), ("prefill", 128), ("prefill, parents", 128), ("prefill", 256),
                                       ("decode", 128), ("decode, parents", 128)])  # fmt: skip
@by_capability
@pytest.mark.parametrize("name", [*LOOKUPS_THAT_MULTIPLY, "take_kernel", "expand_runs_kernel"])
def test_centroid_lookup(name, capability, launch, d, monkeypatch, check_resources):
    from headstart.triton import centroid_lookup as module

    nq, parents = LOOKUPS[launch].values()
    if name not in LOOKUPS_THAT_MULTIPLY and (d != 128 or nq > 1):
        pytest.skip("the same for every head dim and number of queries")
    q, centroids = torch.empty(1, 8, nq, d, dtype=BFLOAT16), torch.empty(2, 6500, d, dtype=BFLOAT16)
    offsets = torch.zeros(2, 6501, dtype=torch.int32)
    level = {}
    if parents is not None:
        level = dict(parent_centroids=centroids[:, :parents].clone(), parent_offsets=offsets[:, : parents + 1].clone())
        level |= dict(parent_threshold=torch.zeros(1))

    def call():
        options = dict(scale=0.1, block_q=64, max_columns=2000, **level)
        _library.triton_kernels["centroid_lookup"](q, centroids, offsets, torch.zeros(1), **options)

    binary = compile_launch([module], monkeypatch, name, capability, call)
    if name in LOOKUPS_THAT_MULTIPLY:
        assert tensor_cores(capability if nq > 1 else 80) in binary.asm["ptx"], "no tensor cores in it"
    check_resources(binary, name, capability, f"{launch}, head dim {d}")


# --- int4_gemm -------------------------------------------------------------------------------------------------------


def int4_kernel(monkeypatch, name, capability, m, dtype, group_size=128, k=4096, zeros=True):
    from headstart.triton import int4_gemm as module

    n = 4096
    x, packed = torch.empty(m, k, dtype=dtype), torch.empty(n // 16, -(-k // 32), 4, 16, dtype=torch.int32)
    scales = torch.empty(n // 16, 1 if group_size == -1 else -(-k // group_size), 16, dtype=dtype)

    def call():
        given = dict(group_size=group_size, n=n)
        zero_points = scales.to(torch.uint8) if zeros else None
        _library.triton_kernels["int4_gemm"](x, packed, scales, zero_points, x.new_empty(n), **given)

    return compile_launch([module], monkeypatch, name, capability, call)


@by_capability
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16, FLOAT32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name, m", [("int4_gemm_kernel", m) for m in (1, 32, 64, 512)] + [("add_parts_kernel", 1)])
@pytest.mark.parametrize("group_size", [32, 128])
def test_int4_gemm(name, m, dtype, group_size, capability, monkeypatch, check_resources):
    if group_size == 32 and (m != 512 or dtype != BFLOAT16) or (name == "add_parts_kernel" and m != 1):
        pytest.skip("differs in the block of K alone")
    binary = int4_kernel(monkeypatch, name, capability, m, dtype, group_size)
    if name == "int4_gemm_kernel" and dtype != FLOAT32:
        assert tensor_cores(capability) in binary.asm["ptx"], "no tensor cores in it"
    assert "atom" not in binary.asm["ptx"]
    check_resources(binary, name, capability, f"{m} rows, {dtype}, group {group_size}")


@by_capability
@pytest.mark.parametrize("m", [1, 32, 64, 512])
def test_int4_weights_are_copied_ahead_and_stay_in_registers(m, capability, monkeypatch):
    """Words, zero points and x come by cp.async, some blocks of K early. What a lane has unpacked, it multiplies:
    nothing unpacked goes through shared memory."""
    binary = int4_kernel(monkeypatch, "int4_gemm_kernel", capability, m, BFLOAT16)
    copied = re.findall(r"async_copy_global_to_local.*?tensor<[\dx]+!tt.ptr<(\w+)>", binary.asm["ttgir"])
    two_warps = (m, capability) == (32, 80)  # too few threads: Triton loads a zero point for each, without a copy
    assert set(copied) == ({"i32", "bf16"} if two_warps else {"i32", "i8", "bf16"}), copied
    loop = main_loop(binary.asm["ptx"])
    assert loop.count("ld.global.b8") == two_warps and loop.count("cp.async.c") >= 3
    assert loop.count("ld.global") <= 4  # the scales of the next block
    assert loop.count("st.shared") <= 2, "unpacked weights in shared memory"


@pytest.mark.slow
@by_capability
@pytest.mark.parametrize("m, dtype", [*((m, BFLOAT16) for m in (1, 32, 64, 512)), (512, FLOAT32)])
@pytest.mark.parametrize(
    "given",
    [dict(zeros=False), dict(group_size=-1), dict(group_size=64), dict(group_size=96, k=4032)]
    + [dict(group_size=-1, k=4104), dict(k=4100)],
    ids=str,
)
def test_no_configuration_of_int4_gemm_spills(given, m, dtype, capability, monkeypatch, check_resources):
    binary = int4_kernel(monkeypatch, "int4_gemm_kernel", capability, m, dtype, **given)
    check_resources(binary, "int4_gemm_kernel", capability)


# --- bitmap_decompress, bitmap_gemm ----------------------------------------------------------------------------------

BITMAP_KINDS = {
    "raw": (None, None), "int8": (torch.int8, None), "int4": (torch.uint8, None),
    "int8, fp32 scales": (torch.int8, FLOAT32),
}  # fmt: skip


@by_capability
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16, FLOAT32, torch.int8], ids=str)
@pytest.mark.parametrize("kind", BITMAP_KINDS)
@pytest.mark.parametrize("m", [0, 1, 32, 64], ids=lambda m: f"{m} rows" if m else "decompress")
def test_bitmap(m, kind, dtype, capability, monkeypatch, check_resources):
    from headstart.triton import bitmap as module

    quantised, scale_dtype = BITMAP_KINDS[kind]
    if dtype == torch.int8 and (m or quantised) or (dtype != BFLOAT16 and (quantised and m > 1 or scale_dtype)):
        pytest.skip("no such kernel, or as for another dtype")
    n, k = 4096, 4096
    values = torch.empty(2**20, dtype=quantised or dtype)
    bitmask, offsets = torch.empty(n, k // 8, dtype=torch.uint8), torch.empty(n + 1, dtype=torch.int64)
    scales = torch.empty(n, k // 128, dtype=scale_dtype or dtype) if quantised else None
    options = dict(scales=scales, group_size=128 if quantised else -1)

    def call():
        if m == 0:
            _library.triton_kernels["bitmap_decompress"](values, bitmask, offsets, k, **options)
        else:
            x = torch.empty(m, k, dtype=dtype)
            _library.triton_kernels["bitmap_gemm"](x, values, bitmask, offsets, x.new_empty(n), cols=k, **options)

    name = "bitmap_gemm_kernel" if m else "bitmap_decompress_kernel"
    binary = compile_launch([module], monkeypatch, name, capability, call)
    ptx = binary.asm["ptx"]
    if m and dtype != FLOAT32:
        assert "mma.sync" in ptx or "wgmma.mma_async" in ptx, "no tensor cores in it"
    if m == 0:
        assert "st.global.v4.b32" in ptx or dtype == torch.int8, "no 16-byte stores"
    assert "atom" not in ptx
    check_resources(binary, name, capability, f"{f'{m} rows, ' if m else ''}{kind}, {dtype}")
