/* So many values with the zero point taken off; padding, which is zero, where there is no input. Returns where they end. */
static column_t *centred(const activation_t *restrict x, int32_t step, int32_t zero, int32_t count, column_t *restrict column)
{
    int32_t i;
    if (x == 0) {
        for (i = 0; i < count; i++) {
            column[i] = 0;
        }
    } else if (step == 1) {
        for (i = 0; i < count; i++) {
            column[i] = (column_t)(x[i] - zero);
        }
    } else {
        for (i = 0; i < count; i++) {
            column[i] = (column_t)(x[i * step] - zero);
        }
    }
    return column + count;
}

/* What one output sees of the input. */
static void window(
    const convolution_t *restrict p, const activation_t *restrict in, int32_t group, int32_t oy, int32_t ox,
    column_t *restrict column)
{
    const int32_t channels = p->in_c / p->groups, left = ox * p->step_w - p->pad_left;
    const activation_t *part = in + group * channels * p->stride_c;
    /* Where neighbours lie one behind the other, a row of taps is one run. */
    const int32_t run = p->stride_c == 1 && p->stride_x == channels && p->dilation_w == 1;
    const int32_t before = left < 0 ? -left : 0, beyond = left + p->kernel_w - p->in_w;
    const int32_t inside = p->kernel_w - before - (beyond > 0 ? beyond : 0);
    int32_t ky, kx;
    for (ky = 0; ky < p->kernel_h; ky++) {
        const int32_t iy = oy * p->step_h - p->pad_top + ky * p->dilation_h;
        const activation_t *x = iy < 0 || iy >= p->in_h ? 0 : part + iy * p->stride_y;
        if (x == 0) {
            column = centred(0, 1, 0, p->kernel_w * channels, column);
        } else if (run && inside > 0) {
            column = centred(0, 1, 0, before * channels, column);
            column = centred(x + (left + before) * channels, 1, p->in_zero, inside * channels, column);
            column = centred(0, 1, 0, (p->kernel_w - before - inside) * channels, column);
        } else {
            for (kx = 0; kx < p->kernel_w; kx++) {
                const int32_t ix = left + kx * p->dilation_w;
                const activation_t *there = ix < 0 || ix >= p->in_w ? 0 : x + ix * p->stride_x;
                column = centred(there, p->stride_c, p->in_zero, channels, column);
            }
        }
    }
}

void conv(const convolution_t *p, const activation_t *in, activation_t *out, column_t *scratch)
{
    const int32_t length = p->kernel_h * p->kernel_w * (p->in_c / p->groups), outputs = p->out_h * p->out_w;
    /* Where a window is one place, and places lie one behind the other as columns do, all columns are one run. */
    const int32_t straight = p->kernel_h * p->kernel_w * p->step_h * p->step_w == 1 && p->pad_top + p->pad_left == 0
        && p->stride_c == 1 && p->stride_x == length && p->stride_y == p->in_w * length && PADDED(length) == length;
    int32_t group, at, i, oy, ox;
    for (i = 0; i < COLUMNS * PADDED(length); i++) {
        scratch[i] = 0;
    }
    for (group = 0; group < p->groups; group++) {
        for (at = 0, oy = 0, ox = 0; at < outputs; at += COLUMNS) {
            const int32_t count = outputs - at < COLUMNS ? outputs - at : COLUMNS;
            if (straight && p->out_w == p->in_w) {
                centred(in + at * length, 1, p->in_zero, count * length, scratch);
            } else {
                for (i = 0; i < count; i++) {
                    window(p, in, group, oy, ox, scratch + i * PADDED(length));
                    if (++ox == p->out_w) {
                        ox = 0;
                        oy++;
                    }
                }
            }
            column_outputs(p, group, scratch, length, count, out + at * p->out_c);
        }
    }
}
