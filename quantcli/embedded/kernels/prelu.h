/* PRelu (docs/arithmetic.md, equation 14): below zero, the multiplier is that of the channel's slope; b counts channels. */
typedef struct {
    loops_t loops;
    int32_t in_zero, out_zero, low, high, rounding, multiplier, shift;
} prelu_t;

void prelu(const prelu_t *p, const int32_t *multiplier, const int8_t *shift, const activation_t *in, activation_t *out);
