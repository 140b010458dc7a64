void extreme(const reduction_t *p, int32_t sign, const activation_t *in, activation_t *out)
{
    int32_t o, i, k;
    for (o = 0; o < p->outer; o++) {
        for (i = 0; i < p->inner; i++) {
            const activation_t *x = in + o * p->length * p->inner + i;
            activation_t best = x[0];
            for (k = 1; k < p->length; k++) {
                best = (x[k * p->inner] - best) * sign > 0 ? x[k * p->inner] : best;
            }
            *out++ = best;
        }
    }
}
