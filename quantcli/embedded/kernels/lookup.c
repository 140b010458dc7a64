void lookup(int32_t count, int32_t lowest, const activation_t *table, const activation_t *in, activation_t *out)
{
    int32_t i;
    for (i = 0; i < count; i++) {
        out[i] = table[in[i] - lowest];
    }
}
