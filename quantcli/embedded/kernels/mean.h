/* The mean (docs/arithmetic.md, equation 14: it divides by the count in the same rounding). */
void mean(const reduction_t *p, const activation_t *in, activation_t *out);
