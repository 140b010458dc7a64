enum { MOST_TAPS = 25 };

/* What one run of outputs needs of each channel, as often as the channels go into LANES. */
typedef struct {
    accumulator_t bias[LANES];
    int32_t multiplier[LANES];
    int8_t shift[LANES], weights[MOST_TAPS * LANES];
} repeated_t;

/* acc += (x - zero) * (w - weight_zero), lane by lane. */
static void tap(
    const activation_t *restrict x, int32_t zero, const int8_t *restrict w, int32_t weight_zero, int32_t lanes,
    accumulator_t *restrict acc)
{
    int32_t j;
    for (j = 0; j < lanes; j++) {
        acc[j] += (accumulator_t)(column_t)(x[j] - zero) * (column_t)(w[j] - weight_zero);
    }
}

/* All taps of a window that begins at (top, left); `row` is how far the weights of neighbouring taps lie apart, and `centres` what
 * each channel's packed ones lie about (0: zero).
 * Of several neighbouring windows, whose inputs are `apart` values from one to the next, the channels are worked on side by side. */
static void all_taps(
    const convolution_t *p, const activation_t *in, int32_t top, int32_t left, const int8_t *weights, const int8_t *centres,
    int32_t row, int32_t lanes, int32_t several, int32_t apart, accumulator_t *acc)
{
    int32_t ky, kx;
#if !USES_PACKED_WEIGHTS
    (void)centres;
#endif
    for (ky = 0; ky < p->kernel_h; ky++) {
        const int32_t iy = top + ky * p->dilation_h;
        if (iy < 0 || iy >= p->in_h) {
            continue;
        }
        for (kx = 0; kx < p->kernel_w; kx++) {
            const int32_t ix = left + kx * p->dilation_w;
            const activation_t *x = in + iy * p->stride_y + ix * p->stride_x;
            const int8_t *w = weights + (ky * p->kernel_w + kx) * row;
#if USES_PACKED_WEIGHTS
            int8_t part[LANES];
            int32_t j;
#endif
            if (ix < 0 || ix >= p->in_w) {
                continue;
            }
            if (several > 1 && apart != p->out_c) {
                activation_t together[LANES];
                int32_t i, j;
                for (i = 0; i < several; i++) {
                    for (j = 0; j < p->out_c; j++) {
                        together[i * p->out_c + j] = x[i * apart + j];
                    }
                }
                tap(together, p->in_zero, w, p->weight_zero, lanes, acc);
                continue;
            }
#if USES_PACKED_WEIGHTS
            if (p->packed) {
                unpacked(w, lanes, 0, part);
                for (j = 0; centres != 0 && j < lanes; j++) {
                    part[j] = (int8_t)(part[j] + centres[j]);
                }
                w = part;
            }
#endif
            tap(x, p->in_zero, w, p->weight_zero, lanes, acc);
        }
    }
}

void depthwise(const convolution_t *restrict p, const activation_t *restrict in, activation_t *restrict out)
{
    const int32_t row = p->packed ? (p->out_c + 1) / 2 : p->out_c, taps = p->kernel_h * p->kernel_w;
    const int32_t reach = (p->kernel_w - 1) * p->dilation_w;
    /* Where channels are few, neighbouring outputs are worked on as if they were channels. */
    const int32_t fits = taps <= MOST_TAPS && !p->packed, apart = p->step_w * p->stride_x;
    const int32_t several = fits && p->out_c < LANES ? LANES / p->out_c : 1, many = several * p->out_c;
    accumulator_t acc[LANES];
    repeated_t each;
    int32_t oy, ox, c, j, k;
    for (j = 0; several > 1 && j < many; j++) {
        const int32_t channel = j % p->out_c, at = p->per_channel ? channel : 0;
        each.bias[j] = p->bias[channel];
        each.multiplier[j] = p->multiplier[at];
        each.shift[j] = p->shift[at];
        for (k = 0; k < taps; k++) {
            each.weights[k * LANES + j] = p->weights[k * row + channel];
        }
    }
    for (oy = 0; oy < p->out_h; oy++) {
        const int32_t top = oy * p->step_h - p->pad_top;
        for (ox = 0; ox < p->out_w; ox++) {
            const int32_t left = ox * p->step_w - p->pad_left;
            if (several > 1 && left >= 0 && left + (several - 1) * p->step_w + reach < p->in_w && ox + several <= p->out_w) {
                for (j = 0; j < many; j++) {
                    acc[j] = each.bias[j];
                }
                all_taps(p, in, top, left, each.weights, 0, LANES, many, several, apart, acc);
                finished(
                    acc, many, each.multiplier, each.shift, 1, p->rounding, p->out_zero, p->low, p->high, out);
                ox += several - 1;
                out += many;
                continue;
            }
            for (c = 0; c < p->out_c; c += LANES) {
                const int32_t lanes = p->out_c - c < LANES ? p->out_c - c : LANES, at = p->per_channel ? c : 0;
                for (j = 0; j < lanes; j++) {
                    acc[j] = p->bias[c + j];
                }
                all_taps(
                    p, in + c, top, left, p->weights + (p->packed ? c / 2 : c), p->centres != 0 ? p->centres + c : 0, row, lanes, 1, 0,
                    acc);
                finished(
                    acc, lanes, p->multiplier + at, p->shift + at, p->per_channel, p->rounding, p->out_zero, p->low, p->high,
                    out + c);
            }
            out += p->out_c;
        }
    }
}
