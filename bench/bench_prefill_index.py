"""The index builders beside attention with every block, of which they may cost a tenth."""

FAMILIES = ("prefill_index",)


def test_prefill_index(benchmark, family_work):
    result = benchmark(family_work.call)
    assert family_work.check is None or family_work.check(result) <= family_work.error_bar
