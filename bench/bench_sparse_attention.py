"""Sparse attention, merge and decode beside torch SDPA (and FlexAttention with ``--flex``)."""

FAMILIES = ("sparse_attention", "decode", "merge_attention")


def test_sparse_attention(benchmark, family_work):
    result = benchmark(family_work.call)
    assert family_work.check is None or family_work.check(result) <= family_work.error_bar
