/* What reaches one output: the inputs whose taps fall on it; nothing elsewhere. */
static void reaching(const convolution_t *p, const activation_t *in, int32_t group, int32_t oy, int32_t ox, column_t *column)
{
    const int32_t channels = p->in_c / p->groups;
    const activation_t *part = in + group * channels * p->stride_c;
    int32_t ky, kx, c;
    for (ky = 0; ky < p->kernel_h; ky++) {
        const int32_t y = oy + p->pad_top - ky * p->dilation_h, iy = y / p->step_h;
        for (kx = 0; kx < p->kernel_w; kx++) {
            const int32_t x = ox + p->pad_left - kx * p->dilation_w, ix = x / p->step_w;
            const int inside = y >= 0 && x >= 0 && iy * p->step_h == y && ix * p->step_w == x && iy < p->in_h && ix < p->in_w;
            for (c = 0; c < channels; c++) {
                const int32_t from = iy * p->stride_y + ix * p->stride_x + c * p->stride_c;
                column[c] = (column_t)(inside ? part[from] - p->in_zero : 0);
            }
            column += channels;
        }
    }
}

void conv_transpose(const convolution_t *p, const activation_t *in, activation_t *out, column_t *scratch)
{
    const int32_t length = p->kernel_h * p->kernel_w * (p->in_c / p->groups), outputs = p->out_h * p->out_w;
    int32_t group, at, i, oy, ox;
    for (i = 0; i < COLUMNS * PADDED(length); i++) {
        scratch[i] = 0;
    }
    for (group = 0; group < p->groups; group++) {
        for (at = 0, oy = 0, ox = 0; at < outputs; at += COLUMNS) {
            const int32_t count = outputs - at < COLUMNS ? outputs - at : COLUMNS;
            for (i = 0; i < count; i++) {
                reaching(p, in, group, oy, ox, scratch + i * PADDED(length));
                if (++ox == p->out_w) {
                    ox = 0;
                    oy++;
                }
            }
            column_outputs(p, group, scratch, length, count, out + at * p->out_c);
        }
    }
}
