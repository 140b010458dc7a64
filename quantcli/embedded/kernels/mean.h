/* The mean (docs/arithmetic.md, equation 14: it divides by the count in the same rounding), or with divisor 1 the sum. */
void mean(const reduction_t *p, int32_t divisor, const activation_t *in, activation_t *out);
