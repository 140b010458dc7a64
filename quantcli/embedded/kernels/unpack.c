/* Weights of 4 bits lie two to a byte, the lower half first, about a centre. */
static void unpacked(const int8_t *packed, int32_t count, int32_t centre, int8_t *weights)
{
    int32_t k;
    for (k = 0; k < count; k++) {
        const int32_t byte = packed[k >> 1] & 0xFF, half = (k & 1) != 0 ? byte >> 4 : byte & 0xF;
        weights[k] = (int8_t)((half ^ 8) - 8 + centre);
    }
}
