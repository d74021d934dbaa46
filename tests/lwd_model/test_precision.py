import pytest
import torch

from lwd_model.precision import compute_dtype, cpu_flags

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("flags", "width", "dtype"),
    [
        ({"avx2", "fma"}, 256, torch.float32),  # bf16 is emulated there, and slower
        ({"avx2", "avx512f"}, 256, torch.float32),
        ({"avx512_bf16"}, 256, torch.bfloat16),
        ({"amx_bf16"}, 256, torch.bfloat16),
        ({"avx512_bf16"}, 32, torch.float32),
        (set(), 256, torch.float32),
    ],
)
def test_the_processors_features_decide(flags, width, dtype):
    assert compute_dtype(CPU, width, frozenset(flags)) == dtype


def test_this_machine_is_asked_without_flags():
    assert compute_dtype(CPU, 256) == compute_dtype(CPU, 256, cpu_flags())
