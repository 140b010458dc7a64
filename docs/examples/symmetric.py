"""Symmetric int8 and int16, rounded half to even, and back again; dequantizing int8 and int32."""

import numpy as np

from quantcli.arithmetic.affine import IntegerType, dequantize, quantize, symmetric_parameters

halves = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
one, zero = np.array(1.0, dtype=np.float32), np.array(0)
print("ties at scale 1:", quantize(halves, one, zero, IntegerType("int8"), None))
assert quantize(halves, one, zero, IntegerType("int8"), None).tolist() == [-2, -2, 0, 0, 2, 2]

for name in ("int8", "int16"):
    grid = IntegerType(name)
    scale, _ = symmetric_parameters(-2.5, 2.5, grid)
    q = quantize(halves, np.array(scale), zero, grid, None)
    back = dequantize(q, np.array(scale), zero, None)
    print(
        f"{name}: scale {scale:.9f}", q, "back:", back.round(5), "largest error:", np.abs(back - halves).max().round(6)
    )
    assert np.abs(back - halves).max() <= float(scale) / 2

# An int8 tensor and an int32 accumulator are dequantized alike: real = S · (q − z).
print("int8 100 at 0.02:", dequantize(np.array([100], dtype=np.int8), np.array(0.02, dtype=np.float32), zero, None))
acc_scale = np.array(0.02 * 0.005, dtype=np.float32)
print("int32 123456 at 0.02·0.005:", dequantize(np.array([123456], dtype=np.int32), acc_scale, zero, None))
