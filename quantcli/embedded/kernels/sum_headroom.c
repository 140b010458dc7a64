void sum_headroom(const sum_headroom_t *p, const activation_t *a, const activation_t *b, activation_t *out)
{
    const loops_t *n = &p->loops;
    const int64_t headroom = (int64_t)1 << p->headroom;
    int32_t i, j, k, l;
    for (i = 0; i < n->size[0]; i++) {
        for (j = 0; j < n->size[1]; j++) {
            for (k = 0; k < n->size[2]; k++) {
                const activation_t *x = a + i * n->a[0] + j * n->a[1] + k * n->a[2];
                const activation_t *y = b + i * n->b[0] + j * n->b[1] + k * n->b[2];
                for (l = 0; l < n->size[3]; l++) {
                    const int64_t from_a = (x[l * n->a[3]] - p->a_zero) * headroom;
                    const int64_t from_b = (y[l * n->b[3]] - p->b_zero) * headroom;
                    const int64_t first = rescale(from_a, p->multiplier[0], p->shift[0], p->rounding);
                    const int64_t second = rescale(from_b, p->multiplier[1], p->shift[1], p->rounding);
                    const int64_t both = p->minus ? first - second : first + second;
                    const int64_t q = rescale(both, p->multiplier[2], p->shift[2], p->rounding);
                    *out++ = clamped(q + p->out_zero, p->low, p->high);
                }
            }
        }
    }
}
