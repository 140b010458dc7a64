/* The same integers elsewhere (docs/arithmetic.md, equation 16), read with a, written with b. */
void copy(const loops_t *n, const activation_t *in, activation_t *out);
