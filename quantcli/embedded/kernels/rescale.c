/* acc * multiplier * 2^-shift, rounded as the sidecar says (shift: -31 to 63). The product fits 63 bits: quantcli has seen to it. */
static int64_t rescale(int64_t acc, int64_t multiplier, int64_t shift, int32_t rounding)
{
    int64_t product;
#if USES_ROUNDING_DOUBLE
    if (rounding == ROUNDING_DOUBLE) {
        const int64_t point = MULTIPLIER_BITS - 1, right = shift > point ? shift - point : 0;
        const int64_t left = (int64_t)1 << (shift < point ? point - shift : 0);
        const int64_t high = (acc * left * multiplier + ((int64_t)1 << (point - 1))) >> point;
        const int64_t half = right > 0 ? (int64_t)1 << (right - 1) : 0;
        return high < 0 ? -((-high + half) >> right) : (high + half) >> right;
    }
#endif
    product = acc * multiplier;
#if USES_SHIFTS_TO_THE_LEFT
    if (shift <= 0) {
        return product * ((int64_t)1 << -shift);
    }
#endif
#if USES_ROUNDING_HALF_EVEN
    if (rounding == ROUNDING_HALF_EVEN) {
        const int64_t low = product >> shift, half = (int64_t)1 << (shift - 1);
        const int64_t rest = (int64_t)((uint64_t)product & (((uint64_t)1 << shift) - 1));
        return low + (rest > half || (rest == half && (low & 1) != 0));
    }
#endif
#if USES_ROUNDING_FLOOR
    if (rounding == ROUNDING_FLOOR) {
        return product >> shift;
    }
#endif
    (void)rounding;
    return ((product >> (shift - 1)) + 1) >> 1; /* the product and half of 2^shift, without the sum that might not fit */
}
