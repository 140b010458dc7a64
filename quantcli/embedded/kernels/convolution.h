/* A convolution, or a transposed one (docs/arithmetic.md, equation 13). Sizes are in values, not bytes. */
typedef struct {
    int32_t in_h, in_w, in_c;             /* the input */
    int32_t stride_y, stride_x, stride_c; /* how far its neighbours lie apart */
    int32_t out_h, out_w, out_c;          /* the output, channels last */
    int32_t kernel_h, kernel_w, step_h, step_w, dilation_h, dilation_w, pad_top, pad_left, groups;
    int32_t in_zero, weight_zero, out_zero, low, high, rounding;
    int32_t packed;                       /* 1: weights of 4 bits */
    const int8_t *weights;                /* [out_c][kernel_h][kernel_w][in_c / groups]; packed rows begin at a byte.
                                             STEP values that nothing reads into a result follow the last */
    const int8_t *centres;                /* [out_c], what packed weights lie about; 0: zero */
    const int32_t *bias;                  /* [out_c] */
    int32_t per_channel;                  /* 1: a multiplier and a shift for each output channel; 0: one for all */
    const int32_t *multiplier;
    const int8_t *shift;
} convolution_t;
