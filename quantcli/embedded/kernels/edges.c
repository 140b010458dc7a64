/* real / scale + zero_point, rounded half to even as nearbyint does, held on the grid; what is no number is zero. */
static int32_t quantized(float real, float scale, int32_t zero_point, int32_t low, int32_t high)
{
    const double x = (double)real / (double)scale;
    const int32_t lowest = low - zero_point, highest = high - zero_point;
    int32_t q;
    double rest;
    if (x != x) {
        return zero_point;
    }
    if (x <= (double)lowest) {
        return low;
    }
    if (x >= (double)highest) {
        return high;
    }
    q = (int32_t)x; /* towards zero */
    rest = x - (double)q;
    if (rest > 0.5 || (rest == 0.5 && (q & 1) != 0)) {
        q++;
    } else if (rest < -0.5 || (rest == -0.5 && (q & 1) != 0)) {
        q--;
    }
    return q + zero_point;
}
