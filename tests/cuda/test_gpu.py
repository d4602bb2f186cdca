"""What only a GPU shows: graphs, streams, devices, and models on it. ``make gpu`` runs these after the gates."""

import pytest
import torch
import vitkernels as vk
from support.calls import cotangent, differentiate, replace, tensors
from support.devices import DEVICE, HALF, ON_CPU, dtype_of, is_taken
from support.hostile import HOSTILE, check_head_map_out_of_range, check_packed, packed_call
from support.model_zoo import (
    DEPTH,
    assert_policy,
    expect_kernel_calls,
    output_of,
    outputs_and_gradients,
    timm_model,
    transformers_model,
)
from support.samples import SAMPLES
from torch.utils import _pytree as pytree
from vitkernels.integrations.devices import KERNEL_DTYPES

pytestmark = pytest.mark.skipif(ON_CPU, reason="VITKERNELS_TEST_DEVICE is not cuda")

CORE = [s for s in SAMPLES if "core" in s.tags and is_taken(s)]
each_core = pytest.mark.parametrize("sample", CORE, ids=str)
SLEEP = 500_000_000  # cycles: a quarter of a second, far longer than the host needs to queue a call


def test_the_library_is_loaded():
    """Else everything below is skipped, and nothing has been shown."""
    assert torch.cuda.is_available()
    assert vk._library.backends()["cuda"] == "loaded"


class Problem:
    """A sample's forward and backward with everything that they need already on the device."""

    def __init__(self, sample):
        self.function = sample.function
        # Views that share entries could not be written to later.
        self.call = replace(sample.call(dtype_of(sample, torch.float32)), torch.clone)
        outputs, _ = differentiate(self.function, self.call)
        self.incoming = {tuple(o.shape): cotangent(o) for o in outputs}

    def __call__(self, call=None):
        call = self.call if call is None else call
        return pytree.tree_leaves(differentiate(self.function, call, cotangent=lambda o: self.incoming[tuple(o.shape)]))


def check_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("offsets", HOSTILE, ids=str)
def test_hostile_offsets(offsets):
    """Values that no host checks must not lead a kernel out of its tensors."""
    check_packed(packed_call(offsets, offsets), DEVICE)
    torch.cuda.synchronize()


@each_core
def test_graph_replays_the_same_bits(sample):
    problem = Problem(sample)
    expected = problem()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        problem()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = problem()  # nothing is computed yet
    graph.replay()
    check_same(captured, expected)


@each_core
def test_works_on_the_current_stream(sample):
    """Behind work that is queued there, without waiting for it on the host or passing it by."""
    problem = Problem(sample)
    expected = problem()
    late = replace(problem.call, torch.zeros_like)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        problem(late)  # the allocator has what it needs
        side.synchronize()
        torch.cuda._sleep(SLEEP)
        slept = side.record_event()
        with torch.no_grad():
            for to, value in zip(tensors(late), tensors(problem.call), strict=True):
                to.copy_(value)
        found = problem(late)
        waited = slept.query()
    side.synchronize()
    assert not waited, "the host waited for the device"
    check_same(found, expected)


@each_core
def test_no_host_synchronisation(sample):
    problem = Problem(sample)
    torch.cuda.set_sync_debug_mode("error")
    try:
        problem()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@each_core
def test_another_device_than_the_current_one(sample):
    problem = Problem(sample)
    expected = problem()
    problem.incoming = {shape: t.to("cuda:1") for shape, t in problem.incoming.items()}
    found = problem(replace(problem.call, lambda t: t.to("cuda:1")))
    assert torch.cuda.current_device() == 0 and all(t.device.index == 1 for t in found)
    check_same([t.to("cuda:0") for t in found], expected)


@pytest.mark.parametrize("sample", [s for s in SAMPLES if "linear-memory" in s.tags and is_taken(s)], ids=str)
def test_peak_memory(sample):
    """No N x N matrix: at 8192 tokens one alone would take 128 MB in half precision."""
    sizes = {"b": 1, "h": 1, "g": 1, "d": 8, "v": 8, "q": 8192, "k": 8192, "y": 64}
    sizes["x"] = 128 if "y" in sample.sizes else 8192
    call = sample.call(dtype_of(sample, torch.float32), sizes=sizes)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    differentiate(sample.function, call)
    assert torch.cuda.max_memory_allocated() - before < 64 << 20


def test_head_map_out_of_range():
    check_head_map_out_of_range()


MODELS = {"timm": timm_model, "transformers": transformers_model}
each_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def on_device(make):
    """A float64 model and images for it, and what it computes."""
    model, images = make()
    model, images = model.to(DEVICE), images.to(DEVICE)
    return model, images, outputs_and_gradients(model, images)


def kernel_calls(dtype):
    return DEPTH if dtype in KERNEL_DTYPES["attention"][DEVICE.type] else 0


@each_dtype
@each_model
def test_accelerated_model(make, dtype):
    model, images, truth = on_device(make)
    model, images = model.to(dtype), images.to(dtype)
    stock = outputs_and_gradients(model, images)
    report = vk.accelerate(model)
    assert len(report.replaced) == DEPTH, report
    with expect_kernel_calls(kernel_calls(dtype)):
        ours = outputs_and_gradients(model, images)
    assert_policy(ours, stock, truth, torch.finfo(dtype).eps)
    vk.restore(model)
    again = outputs_and_gradients(model, images)
    assert_policy(again, stock, truth, torch.finfo(dtype).eps)


@each_model
def test_accelerated_model_under_autocast(make):
    model, images, truth = on_device(make)
    model, images = model.float(), images.float()
    with torch.autocast("cuda", torch.bfloat16):
        stock = outputs_and_gradients(model, images)
        vk.accelerate(model)
        with expect_kernel_calls(DEPTH) as recorder:
            ours = outputs_and_gradients(model, images)
    assert all(call[0].dtype == torch.bfloat16 for call in recorder.calls)
    assert_policy(ours, stock, truth, torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@each_model
def test_compiled_model(make, mode):
    """By Inductor, the second time in graphs that PyTorch captures."""
    torch._dynamo.reset()
    model, images = make()
    model, images = model.to(DEVICE, torch.bfloat16), images.to(DEVICE, torch.bfloat16)
    vk.accelerate(model)
    compiled = torch.compile(model, mode=mode)
    with torch.no_grad():
        expected = output_of(model, images)
        for _ in range(4):  # warm-up, capture, replays
            found = output_of(compiled, images).clone()
    torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2)
    torch._dynamo.reset()


@each_dtype
def test_module(dtype):
    """``vk.nn.Attention`` against timm's module of the same name."""
    timm_attention = pytest.importorskip("timm.layers.attention")
    torch.manual_seed(0)
    theirs = timm_attention.Attention(192, 3, qkv_bias=True).to(DEVICE, torch.float64)
    x = torch.randn(2, 197, 192, dtype=torch.float64, device=DEVICE)
    truth = outputs_and_gradients(theirs, x)
    ours = vk.nn.Attention(192, 3, qkv_bias=True, device=DEVICE, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    stock = outputs_and_gradients(theirs.to(dtype), x.to(dtype))
    with expect_kernel_calls(int(dtype in KERNEL_DTYPES["attention"][DEVICE.type])):
        mine = outputs_and_gradients(ours, x.to(dtype))
    assert_policy(mine, stock, truth, torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", HALF, ids=["bfloat16", "float16"])
def test_long_rows_of_many_heads(dtype):
    """More blocks than the chip holds at once, more keys than any sample has."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    q, k, v = (torch.randn(4, 2100, 16, 64, generator=generator, device=DEVICE).to(dtype) for _ in range(3))
    truth = vk.reference.attention(q.double(), k.double(), v.double())
    plain = (vk.reference.attention(q, k, v) - truth).abs().max()
    assert (vk.attention(q, k, v) - truth).abs().max() <= 2 * plain + 1e-3
