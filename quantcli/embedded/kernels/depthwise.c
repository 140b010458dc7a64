/* acc += (x - zero) * (w - weight_zero), channel by channel. */
static void tap(
    const activation_t *restrict x, int32_t zero, const int8_t *restrict w, int32_t weight_zero, int32_t lanes,
    accumulator_t *restrict acc)
{
    int32_t j;
    for (j = 0; j < lanes; j++) {
        acc[j] += (accumulator_t)(column_t)(x[j] - zero) * (column_t)(w[j] - weight_zero);
    }
}

void depthwise(const convolution_t *restrict p, const activation_t *restrict in, activation_t *restrict out)
{
    const int32_t row = p->packed ? (p->out_c + 1) / 2 : p->out_c;
    int32_t oy, ox, c, ky, kx, j;
    for (oy = 0; oy < p->out_h; oy++) {
        for (ox = 0; ox < p->out_w; ox++) {
            for (c = 0; c < p->out_c; c += LANES) {
                const int32_t lanes = p->out_c - c < LANES ? p->out_c - c : LANES;
                accumulator_t acc[LANES];
                for (j = 0; j < lanes; j++) {
                    acc[j] = p->bias[c + j];
                }
                for (ky = 0; ky < p->kernel_h; ky++) {
                    const int32_t iy = oy * p->step_h - p->pad_top + ky * p->dilation_h;
                    if (iy < 0 || iy >= p->in_h) {
                        continue;
                    }
                    for (kx = 0; kx < p->kernel_w; kx++) {
                        const int32_t ix = ox * p->step_w - p->pad_left + kx * p->dilation_w;
                        const activation_t *x = in + iy * p->stride_y + ix * p->stride_x + c;
                        const int8_t *w = p->weights + (ky * p->kernel_w + kx) * row + (p->packed ? c / 2 : c);
#if USES_PACKED_WEIGHTS
                        int8_t part[LANES];
#endif
                        if (ix < 0 || ix >= p->in_w) {
                            continue;
                        }
#if USES_PACKED_WEIGHTS
                        if (p->packed) {
                            unpacked(w, lanes, part);
                            w = part;
                        }
#endif
                        tap(x, p->in_zero, w, p->weight_zero, lanes, acc);
                    }
                }
                finished(
                    acc, lanes, p->multiplier + (p->per_channel ? c : 0), p->shift + (p->per_channel ? c : 0), p->per_channel,
                    p->rounding, p->out_zero, p->low, p->high, out + c);
            }
            out += p->out_c;
        }
    }
}
