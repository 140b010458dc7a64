void max_pool(const pool_t *p, const activation_t *in, activation_t *out);
