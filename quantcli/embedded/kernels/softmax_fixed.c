/* A number with k integer bits is raw * 2^-(31 - k). */
static int64_t fixed_product(int64_t a, int64_t b)
{
    return (a * b + ((int64_t)1 << 30)) >> 31;
}

static int64_t fixed_right(int64_t a, int32_t by)
{
    const int64_t half = by > 0 ? (int64_t)1 << (by - 1) : 0;
    return a < 0 ? -((-a + half) >> by) : (a + half) >> by;
}

static int64_t fixed_left(int64_t a, int32_t by)
{
    const int64_t largest = ((int64_t)1 << 31) - 1, shifted = a * ((int64_t)1 << by);
    return shifted > largest ? largest : shifted < -largest - 1 ? -largest - 1 : shifted;
}

/* e^a for a <= 0 with five integer bits, as a number with none: a series around -1/8, then a factor for each bit. */
static int64_t fixed_exp(int64_t a)
{
    static const int32_t powers[] = {1672461947, 1302514674, 790015084, 290630308, 39332535, 720401, 242};
    const int64_t quarter = (int64_t)1 << 24, eighth = 1895147668, third = 715827883;
    const int64_t within = (int64_t)((uint64_t)a & (uint64_t)(quarter - 1)) - quarter, rest = within - a;
    const int64_t x = fixed_left(within, 5) + ((int64_t)1 << 28);
    const int64_t x2 = fixed_product(x, x), x3 = fixed_product(x2, x), x4 = fixed_product(x2, x2);
    const int64_t tail = fixed_right(fixed_product(fixed_right(x4, 2) + x3, third) + x2, 1);
    int64_t result = eighth + fixed_product(x + tail, eighth);
    int32_t k;
    for (k = 0; k < 7; k++) {
        if ((rest & ((int64_t)1 << (24 + k))) != 0) {
            result = fixed_product(result, powers[k]);
        }
    }
    return a == 0 ? ((int64_t)1 << 31) - 1 : result;
}

/* 1 / (1 + a) for 0 <= a < 1: three steps of Newton and Raphson. */
static int64_t fixed_reciprocal(int64_t a)
{
    const int64_t whole = a + ((int64_t)1 << 31) - 1, half = (whole + (whole >= 0 ? 1 : -1)) >> 1;
    int64_t x = 1515870810 + fixed_product(half, -1010580540);
    int32_t k;
    for (k = 0; k < 3; k++) {
        x += fixed_left(fixed_product(x, ((int64_t)1 << 29) - fixed_product(half, x)), 2);
    }
    return fixed_left(x, 1);
}

/* The exponential of what lies `difference` above the largest input (so far below it). */
static int64_t fixed_term(const reduction_t *p, int32_t difference)
{
    return fixed_exp(fixed_product(difference * ((int64_t)1 << (31 - p->shift)), p->multiplier));
}

void softmax_fixed(const reduction_t *p, int32_t radius, const activation_t *in, activation_t *out)
{
    int32_t o, i, k;
    for (o = 0; o < p->outer; o++) {
        for (i = 0; i < p->inner; i++) {
            const int32_t begin = o * p->length * p->inner + i;
            const activation_t *x = in + begin;
            activation_t *y = out + begin;
            int32_t highest = x[0], leading = 31;
            int64_t total = 0, inverse;
            for (k = 1; k < p->length; k++) {
                highest = x[k * p->inner] > highest ? x[k * p->inner] : highest;
            }
            for (k = 0; k < p->length; k++) {
                const int32_t difference = x[k * p->inner] - highest;
                total += difference >= -radius ? fixed_right(fixed_term(p, difference), 12) : 0;
            }
            while ((total >> (31 - leading)) > 1) {
                leading--;
            }
            inverse = fixed_reciprocal(total * ((int64_t)1 << leading) - ((int64_t)1 << 31));
            for (k = 0; k < p->length; k++) {
                const int32_t difference = x[k * p->inner] - highest;
                const int64_t product = difference >= -radius ? fixed_product(fixed_term(p, difference), inverse) : 0;
                y[k * p->inner] = clamped(fixed_right(product, 12 - leading + 31 - 8) + p->out_zero, p->low, p->high);
            }
        }
    }
}
