"""Gradients against finite differences, in float64."""

from support.gates.gradcheck import gradients_match_differences
from support.samples import each_small_sample


@each_small_sample
def test_gradcheck(sample):
    gradients_match_differences(sample)
