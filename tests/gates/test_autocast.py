"""Under autocast the data become bfloat16; statistics, biases and scales keep their precision."""

from support.gates import autocast
from support.samples import each_small_sample


@each_small_sample
def test_casts_the_data_alone(sample):
    autocast.casts_the_data_alone(sample)


@each_small_sample
def test_float64_stays(sample):
    autocast.float64_stays(sample)
