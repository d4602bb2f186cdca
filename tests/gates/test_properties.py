"""Sizes that nobody thought of: every sample at lengths drawn at random, within the error policy.

The floor is wider: a gradient that is the small rest of a large sum, as those of constants in a softmax, comes up too.
"""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.devices import why_not
from support.error_policy import FLOOR, check_sample
from support.samples import SMALL_SAMPLES

# Maps of any size, whose reference makes a matrix of all pairs, are in test_spatial_pattern.
DENSE = [s for s in SMALL_SAMPLES if s.operator != "spatial_attention"]
TOKENS = st.integers(0, 40) | st.integers(41, 400)
LENGTHS = {
    "b": st.integers(0, 3), "q": TOKENS, "k": TOKENS, "a": st.integers(0, 9),
    "d": st.integers(1, 70), "v": st.integers(1, 70), "n": st.integers(1, 5), "t": TOKENS, "u": TOKENS,
    "z": st.integers(1, 4), "y": st.integers(1, 12), "x": st.integers(1, 40),
}  # fmt: skip


@st.composite
def cases(draw):
    # Where logits tie at 1e8, an lse in float32 cannot tell the backward how many did.
    sample = draw(st.sampled_from([s for s in DENSE if "beyond-lse" not in s.tags and not why_not(s)]))
    sizes = {letter: draw(lengths) for letter, lengths in LENGTHS.items() if letter in sample.sizes}
    if sample.operator.startswith("linear_attention") and "d" in sizes:
        # With one feature the query cancels out of the result: its gradient is what rounding leaves of zero.
        sizes["d"] = max(sizes["d"], 2)
    if sample.operator == "long_conv":  # as many positions as taps, of which a filter may have a number of its own
        sizes |= {"n": max(sizes["n"], sample.sizes.get("m", 0))} if "n" in sizes else {}
    dtypes = [dtype for dtype in FLOOR if not why_not(sample, dtype)]
    return sample, sizes, draw(st.sampled_from(dtypes)), draw(st.integers(0, 2**16))


@settings(
    max_examples=400, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
@given(cases())
def test_any_sizes(case):
    sample, sizes, dtype, seed = case
    check_sample(sample, dtype, slack=10.0, sizes=sizes, seed=seed)
