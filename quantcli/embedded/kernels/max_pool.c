void max_pool(const pool_t *p, const activation_t *in, activation_t *out)
{
    int32_t oy, ox, ky, kx, c;
    for (oy = 0; oy < p->out_h; oy++) {
        for (ox = 0; ox < p->out_w; ox++) {
            for (c = 0; c < p->channels; c++) {
                out[c] = (activation_t)p->low;
            }
            for (ky = 0; ky < p->kernel_h; ky++) {
                const int32_t iy = oy * p->step_h - p->pad_top + ky * p->dilation_h;
                for (kx = 0; kx < p->kernel_w; kx++) {
                    const int32_t ix = ox * p->step_w - p->pad_left + kx * p->dilation_w;
                    if (iy >= 0 && iy < p->in_h && ix >= 0 && ix < p->in_w) {
                        const activation_t *x = in + (iy * p->in_w + ix) * p->channels;
                        for (c = 0; c < p->channels; c++) {
                            out[c] = x[c] > out[c] ? x[c] : out[c];
                        }
                    }
                }
            }
            out += p->channels;
        }
    }
}
