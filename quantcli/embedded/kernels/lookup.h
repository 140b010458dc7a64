/* An element-wise function (docs/arithmetic.md, equation 15): table[x - lowest]. */
void lookup(int32_t count, int32_t lowest, const activation_t *table, const activation_t *in, activation_t *out);
