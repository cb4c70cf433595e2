"""Captured rows as arrays: whatever the order in memory, the values in the order of the axes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fmextract.pipeline import chunks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(3, 70, 64), (2, 65, 9, 8), (1, 3, 4, 5, 6), (4, 7), (2, 1, 3, 3), (0, 5, 4, 4)])
def test_any_order_in_memory(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    values = (torch.randn(shape) * 100).to(dtype)
    orders = {
        "contiguous": values,
        "channels last": values.movedim(1, -1).contiguous().movedim(-1, 1),
        "some of more channels, last": torch.cat([values, values, values], 1)
        .movedim(1, -1)
        .contiguous()
        .movedim(-1, 1)[:, shape[1] : 2 * shape[1]],
        "reversed": values.permute(*reversed(range(values.ndim))).contiguous().permute(*reversed(range(values.ndim))),
        "every second": torch.repeat_interleave(values, 2, 1)[:, ::2],
    }
    if dtype.is_floating_point:
        orders["negated when it is read"] = torch._neg_view((-values).movedim(1, -1).contiguous().movedim(-1, 1))
    expected = values.view(torch.int16).numpy().view(np.uint16) if dtype == torch.bfloat16 else values.numpy()
    for name, laid_out in orders.items():
        array = chunks.as_array(laid_out)
        assert array.flags.c_contiguous, name
        np.testing.assert_array_equal(array, expected, err_msg=name)
        lying = chunks.as_array(laid_out, channels_last=True)
        assert lying.flags.c_contiguous or lying.shape[1] == 1 or lying.strides[1] == lying.itemsize, name
        np.testing.assert_array_equal(lying.reshape(shape), expected, err_msg=name)
