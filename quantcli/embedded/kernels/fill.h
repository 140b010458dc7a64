/* One value everywhere: padding. */
void fill(int32_t count, int32_t value, activation_t *out);
