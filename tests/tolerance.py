"""An assertion over the four parts of a result."""

from ringattn.launch.oracle import Result, allowed_error, error


def assert_close(got: Result, expected: Result, baseline: Result, factor: float = 2.0) -> None:
    """Every part of `got` is at most `factor` times as far from the oracle as the baseline is."""
    for name, x, right, base in zip(Result._fields, got, expected, baseline, strict=True):
        assert x.dtype == base.dtype
        allowed = allowed_error(base, right, factor)
        assert error(x, right) <= allowed, f"{name}: error {error(x, right):.2e}, allowed {allowed:.2e}"
