/* What is done along one axis: the input lies [outer][length][inner], the output [outer][inner]. */
typedef struct {
    int32_t outer, length, inner;
    int32_t in_zero, out_zero, low, high, rounding, multiplier, shift;
} reduction_t;
