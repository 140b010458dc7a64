/* Four nested loops: how often each runs, and how far each operand moves with it. The output of what computes is contiguous. */
typedef struct {
    int32_t size[4], a[4], b[4];
} loops_t;
