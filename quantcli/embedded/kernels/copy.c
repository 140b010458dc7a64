void copy(const loops_t *n, const activation_t *in, activation_t *out)
{
    int32_t i, j, k, l;
    for (i = 0; i < n->size[0]; i++) {
        for (j = 0; j < n->size[1]; j++) {
            for (k = 0; k < n->size[2]; k++) {
                const activation_t *x = in + i * n->a[0] + j * n->a[1] + k * n->a[2];
                activation_t *y = out + i * n->b[0] + j * n->b[1] + k * n->b[2];
                for (l = 0; l < n->size[3]; l++) {
                    y[l * n->b[3]] = x[l * n->a[3]];
                }
            }
        }
    }
}
