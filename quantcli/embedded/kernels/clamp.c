/* An output held within the clamp: in two steps, which compilers make without branches; on which side it falls cannot be foretold. */
static activation_t clamped(int64_t q, int32_t low, int32_t high)
{
    const int64_t raised = q < low ? low : q;
    return (activation_t)(raised > high ? high : raised);
}
