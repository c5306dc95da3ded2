"""What the Triton kernels are launched with: grids, configurations, parts. Nothing is compiled or run."""

from __future__ import annotations

import itertools

import pytest
import torch

from triton_testing import record

pytest.importorskip("triton", reason="triton is not installed")


# --- sparse_attention ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernels():
    from headstart.triton import sparse_attention

    return sparse_attention


def attention_modules():
    from headstart.triton import block_lists, sparse_attention

    return sparse_attention, block_lists, sparse_attention.decode


def test_a_window_as_long_as_the_keys_is_none(kernels, monkeypatch):
    q, index = (
        torch.empty(1, 1, 70, 64),
        (torch.zeros(1, 1, 2, dtype=torch.int32), torch.zeros(1, 1, 2, 2, dtype=torch.int32)),
    )
    launches = record(monkeypatch, *attention_modules())
    for window, expected in ((None, False), (69, True), (70, False), (2**40, False)):
        kernels.sparse_attention(q, q, q, *index, window=window)
        assert launches["sparse_attention_kernel"].options["HAS_WINDOW"] is expected


@pytest.mark.parametrize(
    "hq, hkv, hi, nq, times",
    [(8, 2, 1, 1, 1), (8, 2, 2, 4, 1), (8, 2, 4, 1, 2), (8, 2, 8, 1, 4), (12, 6, 4, 1, 2), (8, 1, 1, 7, 2)],
)
@pytest.mark.parametrize("processors", [1, 10**6])
def test_keys_and_values_are_read_once_for_all_heads_that_may_share_them(
    processors, hq, hkv, hi, nq, times, kernels, monkeypatch
):
    """Each program of the grid's first dimension walks one list once: `times` of them for a KV head, however many
    programs share a walk. 8 heads of 7 queries are 56 rows, two tiles; heads of different lists cannot share."""
    launches = record(monkeypatch, *attention_modules())
    limits = kernels.device_limits(torch.device("cpu"))._replace(processors=processors)
    monkeypatch.setattr(kernels, "device_limits", lambda device: limits)
    batch, nk = 3, 2048
    q, k = (torch.empty(batch, heads, n, 64, dtype=torch.float16) for heads, n in ((hq, nq), (hkv, nk)))
    lists = torch.zeros(batch, hi, 1, dtype=torch.int32), torch.zeros(batch, hi, 1, nk // 64, dtype=torch.int32)
    kernels.sparse_attention(q, k, k, *lists)
    walks, splits = launches["split_attention_kernel"].grid
    assert walks == batch * hkv * times and (splits == 1) == (processors == 1)
    assert hasattr(launches["merge_splits_kernel"], "grid") == (splits > 1)
    assert not hasattr(launches["sparse_attention_kernel"], "grid")


def test_splits_fill_the_device_and_no_more(kernels):
    choose = kernels.decode.choose_splits
    assert choose(8, 131072, 132) == 33 and choose(32, 131072, 132) == 9  # 264 and 288 programs for 132 SMs
    assert choose(8, 1000, 132) == 3 and choose(8, 100, 132) == 1  # none shorter than 256 keys
    assert choose(512, 131072, 132) == 1 and choose(1, 10**6, 132) == kernels.decode.MAX_SPLITS


def test_only_long_rows_are_sorted(kernels, monkeypatch):
    launches = record(monkeypatch, *attention_modules())
    for nq, nk, causal, expected in ((512, 512, True, False), (512, 8192, True, True), (512, 8192, False, True),
                                     (64, 8192, True, False), (512, 2048, True, False)):  # fmt: skip
        q, k = torch.empty(1, 1, nq, 64, dtype=torch.float16), torch.empty(1, 1, nk, 64, dtype=torch.float16)
        lists = torch.zeros(1, 1, nq // 64, dtype=torch.int32), torch.zeros(1, 1, nq // 64, 128, dtype=torch.int32)
        kernels.sparse_attention(q, k, k, *lists, causal=causal)
        assert launches["sparse_attention_kernel"].options["HAS_ORDER"] is expected, (nq, nk, causal)


def test_head_dims_are_cut_where_that_wastes_less(kernels):
    for d in range(8, 257, 8):
        d0, d1 = kernels.split_head_dim(d)
        assert d0 + d1 >= d and (d0 & (d0 - 1)) == (d1 & (d1 - 1)) == 0
        assert d0 + d1 <= max(16, 1 << (d - 1).bit_length()) and d0 >= 16 and (d1 == 0 or d1 >= 16)
    assert [kernels.split_head_dim(d) for d in (80, 96, 128, 192)] == [(64, 16), (64, 32), (128, 0), (128, 64)]


def test_every_configuration_fits_its_device(kernels):
    for limits in (kernels.Limits(99 * 1024, 1, False), kernels.Limits(227 * 1024, 1, True)):
        for d in range(8, 257, 8):
            for size in (2, 4):
                for block, masked in itertools.product((64, 128), (True, False)):
                    c = kernels.choose_config(d, 4096, block, block, size, limits, masked)
                    assert block % c.block_m == 0 and block % c.block_n == 0
                    assert c.num_stages >= 1 and min(c.block_m, c.block_n) >= 16
                    assert 2 * c.block_n * (c.d0 + c.d1) * size * c.num_stages <= limits.shared_memory


# --- int4_gemm -------------------------------------------------------------------------------------------------------


def test_parts_depend_on_k_alone_and_cover_it():
    from headstart.triton.int4_gemm import choose_parts

    for k in (1, 32, 33, 1000, 1024, 1025, 4096, 14336, 53248, 10**6):
        parts, slabs = choose_parts(k)
        assert slabs % 4 == 0 and (parts - 1) * slabs < -(-k // 32) <= parts * slabs and parts <= 16
