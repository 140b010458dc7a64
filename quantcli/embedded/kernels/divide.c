/* numerator / denominator, rounded as the sidecar says; the denominator is positive. */
static int64_t divided(int64_t numerator, int64_t denominator, int32_t rounding)
{
    int64_t low = numerator / denominator, rest = numerator % denominator;
    if (rest < 0) {
        low -= 1;
        rest += denominator;
    }
    if (rounding == ROUNDING_FLOOR) {
        return low;
    }
    if (rounding == ROUNDING_HALF_EVEN && 2 * rest == denominator) {
        return low + (low & 1);
    }
    return low + (2 * rest >= denominator);
}
