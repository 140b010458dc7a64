static accumulator_t row_product(const activation_t *restrict x, int32_t zero, const int8_t *restrict weights, int32_t count)
{
    accumulator_t acc = 0;
    int32_t k;
    for (k = 0; k < count; k++) {
        acc += (accumulator_t)(column_t)(x[k] - zero) * (column_t)weights[k];
    }
    return acc;
}

void fully_connected(const fully_connected_t *restrict p, const activation_t *restrict in, activation_t *restrict out)
{
    const int32_t row = p->packed ? (p->inputs + 1) / 2 : p->inputs;
    int32_t r, first, m, k;
    for (r = 0; r < p->rows; r++) {
        const activation_t *restrict x = in + r * p->inputs;
        accumulator_t sum = 0, block[LANES];
        if (p->weight_zero != 0) {
            for (k = 0; k < p->inputs; k++) {
                sum += p->weight_zero * (x[k] - p->in_zero);
            }
        }
        for (first = 0; first < p->outputs; first += LANES) {
            const int32_t lanes = p->outputs - first < LANES ? p->outputs - first : LANES, at = p->per_channel ? first : 0;
            for (m = 0; m < lanes; m++) {
                const int8_t *restrict weights = p->weights + (first + m) * row;
                block[m] = p->bias[first + m] - sum;
#if USES_PACKED_WEIGHTS
                if (p->packed) {
                    const int32_t centre = p->centres != 0 ? p->centres[first + m] : 0;
                    int8_t part[64];
                    for (k = 0; k < p->inputs; k += 64) {
                        const int32_t some = p->inputs - k < 64 ? p->inputs - k : 64;
                        unpacked(weights + k / 2, some, centre, part);
                        block[m] += row_product(x + k, p->in_zero, part, some);
                    }
                } else
#endif
                {
                    block[m] += row_product(x, p->in_zero, weights, p->inputs);
                }
            }
            finished(
                block, lanes, p->multiplier + at, p->shift + at, p->per_channel, p->rounding, p->out_zero, p->low, p->high,
                out + r * p->outputs + first);
        }
    }
}
