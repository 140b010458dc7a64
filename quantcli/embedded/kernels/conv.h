/* scratch holds COLUMNS columns of PADDED(kernel_h * kernel_w * in_c / groups) values. */
void conv(const convolution_t *p, const activation_t *in, activation_t *out, column_t *scratch);
