void fill(int32_t count, int32_t value, activation_t *out)
{
    int32_t i;
    for (i = 0; i < count; i++) {
        out[i] = (activation_t)value;
    }
}
