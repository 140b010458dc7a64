/* The product of two matrices of activations, or of so many pairs of them (docs/arithmetic.md, equation 13). */
typedef struct {
    int32_t count, rows, inputs, outputs;
    int32_t a_step, b_step; /* from one pair to the next: 0 where all share one */
    int32_t a_zero, b_zero, out_zero, low, high, rounding, multiplier, shift;
} matrix_product_t;

void matrix_product(const matrix_product_t *p, const activation_t *a, const activation_t *b, activation_t *out);
