/* The highest integer, or with sign -1 the lowest. */
void extreme(const reduction_t *p, int32_t sign, const activation_t *in, activation_t *out);
