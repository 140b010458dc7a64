/* A fully connected layer (docs/arithmetic.md, equation 13). */
typedef struct {
    int32_t rows, inputs, outputs;
    int32_t in_zero, weight_zero, out_zero, low, high, rounding;
    int32_t packed;        /* 1: weights of 4 bits */
    const int8_t *weights; /* [outputs][inputs]; packed rows begin at a byte */
    const int8_t *centres; /* [outputs], what packed weights lie about; 0: zero */
    const int32_t *bias;   /* [outputs] */
    int32_t per_channel;   /* 1: a multiplier and a shift for each output; 0: one for all */
    const int32_t *multiplier;
    const int8_t *shift;
} fully_connected_t;

void fully_connected(const fully_connected_t *p, const activation_t *in, activation_t *out);
