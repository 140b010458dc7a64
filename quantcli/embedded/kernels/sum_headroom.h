/* a +- b as TFLite has it (docs/arithmetic.md, equation 14a): operands shifted left, rescaled, added, rescaled again. */
typedef struct {
    loops_t loops;
    int32_t a_zero, b_zero, out_zero, low, high, rounding, minus, headroom;
    int32_t multiplier[3], shift[3];
} sum_headroom_t;

void sum_headroom(const sum_headroom_t *p, const activation_t *a, const activation_t *b, activation_t *out);
