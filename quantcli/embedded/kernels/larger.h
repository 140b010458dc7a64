/* The larger of a and b, or with sign -1 the smaller (docs/arithmetic.md, equation 14: each is rescaled by itself). */
typedef struct {
    loops_t loops;
    int32_t a_zero, b_zero, out_zero, low, high, rounding, sign;
    int32_t multiplier[2], shift[2];
} larger_t;

void larger(const larger_t *p, const activation_t *a, const activation_t *b, activation_t *out);
