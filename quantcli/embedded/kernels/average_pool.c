/* How many taps of a window count along one axis. */
static int32_t counted(int32_t begin, int32_t taps, int32_t dilation, int32_t first, int32_t size)
{
    int32_t count = 0, k;
    for (k = 0; k < taps; k++) {
        const int32_t at = begin + k * dilation;
        count += at >= -first && at < size;
    }
    return count;
}

void average_pool(const pool_t *p, const activation_t *in, activation_t *out)
{
    const int64_t left = (int64_t)1 << (p->shift < 0 ? -p->shift : 0);
    const int32_t zero = p->same_grid ? 0 : p->in_zero;
    int32_t oy, ox, ky, kx, c;
    for (oy = 0; oy < p->out_h; oy++) {
        const int32_t top = oy * p->step_h - p->pad_top;
        const int32_t high = counted(top, p->kernel_h, p->dilation_h, p->count_top, p->count_h);
        for (ox = 0; ox < p->out_w; ox++) {
            const int32_t begin = ox * p->step_w - p->pad_left;
            const int32_t wide = counted(begin, p->kernel_w, p->dilation_w, p->count_left, p->count_w);
            for (c = 0; c < p->channels; c++) {
                int64_t total = 0;
                for (ky = 0; ky < p->kernel_h; ky++) {
                    for (kx = 0; kx < p->kernel_w; kx++) {
                        const int32_t iy = top + ky * p->dilation_h, ix = begin + kx * p->dilation_w;
                        if (iy >= 0 && iy < p->in_h && ix >= 0 && ix < p->in_w) {
                            total += in[(iy * p->in_w + ix) * p->channels + c] - zero;
                        }
                    }
                }
                if (p->same_grid) {
                    const int64_t magnitude = divided(total < 0 ? -total : total, (int64_t)high * wide, ROUNDING_SINGLE);
                    *out++ = clamped(total < 0 ? -magnitude : magnitude, p->low, p->high);
                } else {
                    const int64_t count = (int64_t)high * wide * ((int64_t)1 << (p->shift < 0 ? 0 : p->shift));
                    const int64_t q = divided(total * left * p->multiplier, count, p->rounding);
                    *out++ = clamped(q + p->out_zero, p->low, p->high);
                }
            }
        }
    }
}
