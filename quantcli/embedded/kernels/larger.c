void larger(const larger_t *p, const activation_t *a, const activation_t *b, activation_t *out)
{
    const loops_t *n = &p->loops;
    int32_t i, j, k, l;
    for (i = 0; i < n->size[0]; i++) {
        for (j = 0; j < n->size[1]; j++) {
            for (k = 0; k < n->size[2]; k++) {
                const activation_t *x = a + i * n->a[0] + j * n->a[1] + k * n->a[2];
                const activation_t *y = b + i * n->b[0] + j * n->b[1] + k * n->b[2];
                for (l = 0; l < n->size[3]; l++) {
                    const int64_t first = rescale(x[l * n->a[3]] - p->a_zero, p->multiplier[0], p->shift[0], p->rounding);
                    const int64_t second = rescale(y[l * n->b[3]] - p->b_zero, p->multiplier[1], p->shift[1], p->rounding);
                    const int64_t q = (second - first) * p->sign > 0 ? second : first;
                    *out++ = clamped(q + p->out_zero, p->low, p->high);
                }
            }
        }
    }
}
