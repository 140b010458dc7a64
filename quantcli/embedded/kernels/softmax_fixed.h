/* Softmax in 32-bit fixed point, as gemmlowp and TFLite define it (docs/arithmetic.md, equation 18), to 8 bits.
 * multiplier and shift rescale a difference of inputs to five integer bits; what lies further below the largest than `radius` is 0. */
void softmax_fixed(const reduction_t *p, int32_t radius, const activation_t *in, activation_t *out);
