/* Softmax (docs/arithmetic.md, equation 17): table[d] is e^(-scale * d) in units of 2^-30; 1 / out_scale is `steps`. */
void softmax(const reduction_t *p, const int32_t *table, int32_t steps, const activation_t *in, activation_t *out);
