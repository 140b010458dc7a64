/* A pool's windows; the input and the output lie channels last. */
typedef struct {
    int32_t in_h, in_w, channels, out_h, out_w;
    int32_t kernel_h, kernel_w, step_h, step_w, dilation_h, dilation_w, pad_top, pad_left;
    int32_t count_h, count_w;     /* where taps count for the mean: the input, and its padding where that is counted ... */
    int32_t count_top, count_left; /* ... which begins so far before it */
    int32_t same_grid;            /* 1: the mean of the integers themselves, ties away from zero (equation 14b) */
    int32_t in_zero, out_zero, low, high, rounding, multiplier, shift;
} pool_t;
