/* a +- b, formed exactly and rounded once (docs/arithmetic.md, equation 14): the multipliers have one shift, and Sub its sign. */
typedef struct {
    loops_t loops;
    int32_t a_zero, b_zero, out_zero, low, high, rounding, shift;
    int64_t a_multiplier, b_multiplier;
} sum_t;

void sum(const sum_t *p, const activation_t *a, const activation_t *b, activation_t *out);
