"""int8 affine quantization from a float range, and what becomes of {2.1, 8.6}, which excludes zero."""

import numpy as np

from quantcli.arithmetic.affine import IntegerType, affine_parameters, dequantize, quantize

int8 = IntegerType("int8")
scale, zero_point = affine_parameters(-1.3, 4.7, int8)
print(f"[-1.3, 4.7]: scale {scale:.7f}, zero point {zero_point}")

# Wrongly: scale and zero point of the range as it is. zero_point = round(qmax − rmax / S) is no int8, and wraps.
lo, hi = 2.1, 8.6
wrong_scale = (hi - lo) / 255
wrong_zero = round(127 - hi / wrong_scale)
wrapped = int(np.int64(wrong_zero).astype(np.int8))
print(f"[2.1, 8.6] as it is: scale {wrong_scale:.7f}, zero point {wrong_zero}, stored in int8 as {wrapped}")
assert wrong_zero == -210

values = np.array([2.1, 5.0, 8.6])
q = np.clip(np.round(values / wrong_scale) + wrapped, -128, 127)
print("what comes back:", (wrong_scale * (q - wrapped)).round(3))

# Rightly: the range is widened to hold zero. Real zero is exact (padding needs it), and everything else within half a step.
scale, zero_point = affine_parameters(lo, hi, int8)
back = dequantize(
    quantize(values, np.array(scale), np.array(zero_point), int8, None), np.array(scale), np.array(zero_point), None
)
print(f"[0, 8.6]: scale {scale:.7f}, zero point {zero_point}, what comes back:", back.round(3))
assert np.abs(back - values).max() <= float(scale) / 2
