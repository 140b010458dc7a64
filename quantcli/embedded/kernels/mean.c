void mean(const reduction_t *p, int32_t divisor, const activation_t *in, activation_t *out)
{
    const int64_t left = (int64_t)1 << (p->shift < 0 ? -p->shift : 0);
    const int64_t count = divisor * ((int64_t)1 << (p->shift < 0 ? 0 : p->shift));
    int32_t o, i, k;
    for (o = 0; o < p->outer; o++) {
        for (i = 0; i < p->inner; i++) {
            int64_t total = 0;
            for (k = 0; k < p->length; k++) {
                total += in[(o * p->length + k) * p->inner + i] - p->in_zero;
            }
            *out++ = clamped(divided(total * left * p->multiplier, count, p->rounding) + p->out_zero, p->low, p->high);
        }
    }
}
