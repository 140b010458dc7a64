void softmax(const reduction_t *p, const int32_t *table, int32_t steps, const activation_t *in, activation_t *out)
{
    int32_t o, i, k;
    for (o = 0; o < p->outer; o++) {
        for (i = 0; i < p->inner; i++) {
            const int32_t begin = o * p->length * p->inner + i;
            const activation_t *x = in + begin;
            activation_t *y = out + begin;
            int32_t highest = x[0];
            int64_t total = 0;
            for (k = 1; k < p->length; k++) {
                highest = x[k * p->inner] > highest ? x[k * p->inner] : highest;
            }
            for (k = 0; k < p->length; k++) {
                total += table[highest - x[k * p->inner]];
            }
            for (k = 0; k < p->length; k++) {
                const int64_t part = (int64_t)table[highest - x[k * p->inner]] * steps;
                y[k * p->inner] = clamped(divided(part, total, ROUNDING_SINGLE) + p->out_zero, p->low, p->high);
            }
        }
    }
}
