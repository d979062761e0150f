# SPDX-License-Identifier: Apache-2.0
"""The forward-mode pass through modules that PyTorch's data parallelism wraps."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from disca_kernels import dual

X, X_DOT = torch.randn(3, 4), torch.randn(3, 4)


@pytest.fixture(scope="module")
def _process_group(tmp_path_factory):
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(module: nn.Sequential) -> nn.Module:
    for layer in module:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    return fully_shard(module)


@pytest.mark.usefixtures("_process_group")
@pytest.mark.parametrize("wrap", [DistributedDataParallel, sharded])
def test_wrapped_module(wrap):
    module = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4))
    expected = dual.jvp(module, (X,), (X_DOT,))
    expected[0].square().sum().backward()
    wrapped = wrap(copy.deepcopy(module))
    for _ in range(2):  # the second step meets what the first has set up
        wrapped.zero_grad()
        out = dual.jvp(wrapped, (X,), (X_DOT,))
        torch.testing.assert_close(out, expected)
        out[0].square().sum().backward()
        for got, parameter in zip(wrapped.parameters(), module.parameters(), strict=True):
            grad = got.grad.full_tensor() if wrap is sharded else got.grad
            torch.testing.assert_close(grad, parameter.grad)


@pytest.mark.usefixtures("_process_group")
@pytest.mark.parametrize("option", ["find_unused_parameters", "static_graph"])
def test_options_that_search_the_graph_of_the_output_are_refused(option):
    wrapped = DistributedDataParallel(nn.Linear(4, 4), **{option: True})
    with pytest.raises(dual.TangentError, match="_DDPSink"):
        dual.jvp(wrapped, (X,), (X_DOT,))
