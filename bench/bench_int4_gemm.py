"""Int4 linear layers beside torch's int4 operator and a bf16 linear layer."""

FAMILIES = ("int4_gemm",)


def test_int4_gemm(benchmark, family_work):
    result = benchmark(family_work.call)
    assert family_work.check is None or family_work.check(result) <= family_work.error_bar
