/* The same integers elsewhere, each from where the table says. */
void gather(int32_t count, const index_t *from, const activation_t *in, activation_t *out);
