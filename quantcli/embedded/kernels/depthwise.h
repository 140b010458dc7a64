/* One filter for each channel: groups = in_c = out_c, stride_c = 1; the weights lie [kernel_h][kernel_w][out_c]. */
void depthwise(const convolution_t *p, const activation_t *in, activation_t *out);
