void sum(const sum_t *p, const activation_t *a, const activation_t *b, activation_t *out)
{
    const loops_t *n = &p->loops;
    const int32_t step_a = n->a[3], step_b = n->b[3];
    const int64_t zeros = p->a_zero * p->a_multiplier + p->b_zero * p->b_multiplier;
    int32_t i, j, k, l, m;
    for (i = 0; i < n->size[0]; i++) {
        for (j = 0; j < n->size[1]; j++) {
            for (k = 0; k < n->size[2]; k++) {
                const activation_t *x = a + i * n->a[0] + j * n->a[1] + k * n->a[2];
                const activation_t *y = b + i * n->b[0] + j * n->b[1] + k * n->b[2];
                for (l = 0; l < n->size[3]; l += LANES) {
                    const int32_t lanes = n->size[3] - l < LANES ? n->size[3] - l : LANES;
                    int32_t q[LANES]; /* out may be what is read: it is written after that */
                    NOT_IN_NARROW_VECTORS
                    for (m = 0; m < lanes; m++) {
                        const int64_t both = x[m * step_a] * p->a_multiplier + y[m * step_b] * p->b_multiplier - zeros;
                        q[m] = NARROWED(rescale(both, 1, p->shift, p->rounding));
                    }
                    for (m = 0; m < lanes; m++) {
                        const int32_t moved = q[m] + p->out_zero, raised = moved < p->low ? p->low : moved;
                        out[m] = (activation_t)(raised > p->high ? p->high : raised);
                    }
                    x += lanes * step_a;
                    y += lanes * step_b;
                    out += lanes;
                }
            }
        }
    }
}
