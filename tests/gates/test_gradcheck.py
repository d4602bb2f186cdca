"""Gradients against finite differences, in float64."""

from support.gates.gradcheck import gradients_match_differences
from support.samples import COVERING_SMALL, SMALL_SAMPLES, each_of, each_small_sample


@each_of(SMALL_SAMPLES, short=COVERING_SMALL)
def test_gradcheck(sample):
    gradients_match_differences(sample)


@each_small_sample
def test_gradcheck_in_one_direction(sample):
    gradients_match_differences(sample, fast_mode=True)
