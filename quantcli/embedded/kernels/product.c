void product(const product_t *p, const activation_t *a, const activation_t *b, activation_t *out)
{
    const loops_t *n = &p->loops;
    int32_t i, j, k, l;
    for (i = 0; i < n->size[0]; i++) {
        for (j = 0; j < n->size[1]; j++) {
            for (k = 0; k < n->size[2]; k++) {
                const activation_t *x = a + i * n->a[0] + j * n->a[1] + k * n->a[2];
                const activation_t *y = b + i * n->b[0] + j * n->b[1] + k * n->b[2];
                for (l = 0; l < n->size[3]; l++) {
                    const int64_t acc = (int64_t)(x[l * n->a[3]] - p->a_zero) * (y[l * n->b[3]] - p->b_zero);
                    *out++ = clamped(rescale(acc, p->multiplier, p->shift, p->rounding) + p->out_zero, p->low, p->high);
                }
            }
        }
    }
}
