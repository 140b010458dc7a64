/* How many values are worked on side by side. */
enum { LANES = 32 };

/* A rescaled accumulator fits 30 bits, or is held within them: far beyond any clamp. */
#if USES_WIDE_RESULTS
#define NARROWED(value) (int32_t)((value) < -(1 << 29) ? -(1 << 29) : (value) > 1 << 29 ? 1 << 29 : (value))
#else
#define NARROWED(value) (int32_t)(value)
#endif

/* Products of 64 bits are slower in vectors that have none. */
#if defined(__clang__) && !defined(__AVX512DQ__)
#define NOT_IN_NARROW_VECTORS _Pragma("clang loop vectorize(disable)")
#else
#define NOT_IN_NARROW_VECTORS
#endif
