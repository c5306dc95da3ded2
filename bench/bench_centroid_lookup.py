"""Centroid lookup in a long context, beside the reference."""

FAMILIES = ("centroid_lookup",)


def test_centroid_lookup(benchmark, family_work):
    result = benchmark(family_work.call)
    assert family_work.check is None or family_work.check(result) <= family_work.error_bar
