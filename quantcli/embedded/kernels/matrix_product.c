void matrix_product(const matrix_product_t *p, const activation_t *a, const activation_t *b, activation_t *out)
{
    int32_t i, r, m, k;
    for (i = 0; i < p->count; i++) {
        for (r = 0; r < p->rows; r++) {
            for (m = 0; m < p->outputs; m++) {
                const activation_t *x = a + i * p->a_step + r * p->inputs, *y = b + i * p->b_step + m;
                accumulator_t acc = 0;
                for (k = 0; k < p->inputs; k++) {
                    acc += (accumulator_t)(x[k] - p->a_zero) * (y[k * p->outputs] - p->b_zero);
                }
                *out++ = clamped(rescale(acc, p->multiplier, p->shift, p->rounding) + p->out_zero, p->low, p->high);
            }
        }
    }
}
