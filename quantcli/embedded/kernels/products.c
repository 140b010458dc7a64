/* Scalar products of COLUMNS columns of PADDED(length) values with one row of weights, added to every LANES-th of acc.
 * `count` values of each are summed, and where PADDED adds to them the columns hold zeros. */
static void products(
    const column_t *restrict columns, int32_t length, const int8_t *restrict weights, int32_t count, accumulator_t *restrict acc)
{
    const column_t *c0 = columns, *c1 = c0 + PADDED(length), *c2 = c1 + PADDED(length), *c3 = c2 + PADDED(length);
    const int32_t end = PADDED(count);
    accumulator_t a0 = 0, a1 = 0, a2 = 0, a3 = 0;
    int32_t k;
    for (k = 0; k < end; k++) {
        const column_t w = weights[k];
        a0 += (accumulator_t)c0[k] * w;
        a1 += (accumulator_t)c1[k] * w;
        a2 += (accumulator_t)c2[k] * w;
        a3 += (accumulator_t)c3[k] * w;
    }
    acc[0] += a0;
    acc[LANES] += a1;
    acc[2 * LANES] += a2;
    acc[3 * LANES] += a3;
}

/* Outputs of one group for up to COLUMNS columns, each of `length` values with their zero point taken off. */
static void column_outputs(
    const convolution_t *restrict p, int32_t group, const column_t *restrict columns, int32_t length, int32_t count,
    activation_t *restrict out)
{
    const int32_t channels = p->out_c / p->groups, row = p->packed ? (length + 1) / 2 : length;
    accumulator_t sums[COLUMNS] = {0}, block[COLUMNS * LANES];
    int32_t first, m, i, k;
    if (p->weight_zero != 0) {
        for (i = 0; i < count; i++) {
            for (k = 0; k < length; k++) {
                sums[i] += p->weight_zero * columns[i * PADDED(length) + k];
            }
        }
    }
    for (first = group * channels; first < (group + 1) * channels; first += LANES) {
        const int32_t rest = (group + 1) * channels - first, lanes = rest < LANES ? rest : LANES;
        const int32_t at = p->per_channel ? first : 0;
        for (i = 0; i < COLUMNS; i++) {
            for (m = 0; m < lanes; m++) {
                block[i * LANES + m] = p->bias[first + m] - sums[i];
            }
        }
        for (m = 0; m < lanes; m++) {
            const int8_t *restrict weights = p->weights + (first + m) * row;
#if USES_PACKED_WEIGHTS
            if (p->packed) {
                const int32_t centre = p->centres != 0 ? p->centres[first + m] : 0;
                int8_t part[64] = {0};
                for (k = 0; k < length; k += 64) {
                    const int32_t some = length - k < 64 ? length - k : 64;
                    unpacked(weights + k / 2, some, centre, part);
                    products(columns + k, length, part, some, block + m);
                }
            } else
#endif
            {
                products(columns, length, weights, length, block + m);
            }
        }
        for (i = 0; i < count; i++) {
            finished(
                block + i * LANES, lanes, p->multiplier + at, p->shift + at, p->per_channel, p->rounding, p->out_zero, p->low, p->high,
                out + i * p->out_c + first);
        }
    }
}
