void gather(int32_t count, const index_t *from, const activation_t *in, activation_t *out)
{
    int32_t i;
    for (i = 0; i < count; i++) {
        out[i] = in[from[i]];
    }
}
