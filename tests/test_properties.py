"""Sizes that nobody thought of: every sample at shapes drawn at random, smallest failing ones first."""

import pytest
import torch
from error_policy import check_sample
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from samples import SMALL_SAMPLES, each_sample
