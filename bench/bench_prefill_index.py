"""The index builders beside attention with every block. They may cost a twentieth of it."""

FAMILIES = ("prefill_index",)


def test_prefill_index(benchmark, family_work):
    result = benchmark(family_work.call)
    assert family_work.check is None or family_work.check(result) <= family_work.error_bar
