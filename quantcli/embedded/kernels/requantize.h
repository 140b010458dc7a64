/* The same reals on another grid (docs/arithmetic.md, equation 14 for one operand), read with a, written with b. */
typedef struct {
    loops_t loops;
    int32_t in_zero, out_zero, low, high, rounding, multiplier, shift;
} requantize_t;

void requantize(const requantize_t *p, const activation_t *in, activation_t *out);
