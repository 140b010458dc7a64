/* a * b (docs/arithmetic.md, equation 13 with a single term). */
typedef struct {
    loops_t loops;
    int32_t a_zero, b_zero, out_zero, low, high, rounding, multiplier, shift;
} product_t;

void product(const product_t *p, const activation_t *a, const activation_t *b, activation_t *out);
