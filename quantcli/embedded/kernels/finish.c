/* Up to LANES outputs of neighbouring channels from their accumulators: in two loops, each of which compilers can do in vectors. */
static void finished(
    const accumulator_t *restrict acc, int32_t count, const int32_t *restrict multiplier, const int8_t *restrict shift,
    int32_t per_channel, int32_t rounding, int32_t out_zero, int32_t low, int32_t high, activation_t *restrict out)
{
    int32_t q[LANES], j;
    if (per_channel) {
        NOT_IN_NARROW_VECTORS
        for (j = 0; j < count; j++) {
            q[j] = NARROWED(rescale(acc[j], multiplier[j], shift[j], rounding));
        }
    } else {
        const int32_t by = multiplier[0], right = shift[0];
        NOT_IN_NARROW_VECTORS
        for (j = 0; j < count; j++) {
            q[j] = NARROWED(rescale(acc[j], by, right, rounding));
        }
    }
    for (j = 0; j < count; j++) {
        const int32_t moved = q[j] + out_zero, raised = moved < low ? low : moved;
        out[j] = (activation_t)(raised > high ? high : raised);
    }
}
