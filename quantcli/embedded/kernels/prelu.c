void prelu(const prelu_t *p, const int32_t *multiplier, const int8_t *shift, const activation_t *in, activation_t *out)
{
    const loops_t *n = &p->loops;
    int32_t i, j, k, l;
    for (i = 0; i < n->size[0]; i++) {
        for (j = 0; j < n->size[1]; j++) {
            for (k = 0; k < n->size[2]; k++) {
                const activation_t *x = in + i * n->a[0] + j * n->a[1] + k * n->a[2];
                const int32_t first = i * n->b[0] + j * n->b[1] + k * n->b[2];
                for (l = 0; l < n->size[3]; l++) {
                    const int32_t c = first + l * n->b[3], q = x[l * n->a[3]] - p->in_zero, below = q < 0;
                    const int64_t scaled =
                        rescale(q, below ? multiplier[c] : p->multiplier, below ? shift[c] : p->shift, p->rounding);
                    *out++ = clamped(scaled + p->out_zero, p->low, p->high);
                }
            }
        }
    }
}
