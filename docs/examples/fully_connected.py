"""A fully connected layer in integers, twice: with M0 = int(s·2^16) and a bare shift, and with quantcli's arithmetic.

The first way quantizes the input symmetrically with a scale known ahead, the weights with the scale of their largest magnitude,
and the bias at the input's scale. The product of the integers stands at S_x·S_w; multiplied by S_w it would stand at S_x, where
the bias is. In place of that float multiplication stands an integer one, M0 = int(S_w·2^16), and a shift by 16.
"""

import numpy as np

from quantcli.arithmetic.affine import IntegerType, affine_parameters, quantize, symmetric_parameters, symmetric_scales
from quantcli.arithmetic.fixed_point import fixed_point, multiply

x = np.array([0.5, -1.2, 2.0, 0.1])
w = np.array([[0.30, -0.20, 0.10, 0.05], [0.02, 0.01, -0.03, 0.04], [-0.50, 0.40, 0.25, -0.35]])
b = np.array([0.10, -0.05, 0.30])
y = w @ x + b
print("real:", y.round(5))

# The text's way: everything per tensor, int8, truncated.
s_x, s_w = 2.0 / 127, np.abs(w).max() / 127
q_x, q_w, q_b = np.round(x / s_x).astype(int), np.round(w / s_w).astype(int), np.round(b / s_x).astype(int)
m0 = int(s_w * 2**16)
acc = q_w @ q_x
q_y = (acc * m0 >> 16) + q_b
print("q_x:", q_x, "acc:", acc, "M0:", m0, "q_y:", q_y)
simple = q_y * s_x
print("M0 of 9 bits, floor:", simple.round(5), "largest error:", np.abs(simple - y).max().round(5))

# Ours: weights per output channel, the bias at S_x·S_w, an output scale of its own, M0 of 31 bits, rounded once.
int8, narrow, uint8 = IntegerType("int8"), IntegerType("int8", narrow=True), IntegerType("uint8")
scale_x, _ = symmetric_parameters(-2.0, 2.0, int8)
scale_w = symmetric_scales(np.abs(w).max(axis=1), narrow)
scale_y, zero_y = affine_parameters(float(y.min()), float(y.max()), uint8)
q_x = quantize(x, np.array(scale_x), np.array(0), int8, None).astype(np.int64)
q_w = quantize(w, scale_w, np.zeros(3, dtype=int), narrow, 0).astype(np.int64)
bias_scale = np.float64(scale_x) * scale_w
acc = q_w @ q_x + np.rint(b / bias_scale).astype(np.int64)
multiplier, shift = fixed_point(bias_scale / np.float64(scale_y))
q_y = np.clip(multiply(acc, multiplier, shift, "single") + zero_y, uint8.qmin, uint8.qmax)
ours = float(scale_y) * (q_y - zero_y)
print("acc:", acc, "M0:", multiplier, "n:", shift, "q_y:", q_y)
print("M0 of 31 bits, rounded:", ours.round(5), "largest error:", np.abs(ours - y).max().round(5))
assert np.abs(ours - y).max() < np.abs(simple - y).max()
