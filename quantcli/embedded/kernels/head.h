#include <stdint.h>

/* Right shifts of negative numbers have to keep the sign. */
typedef char right_shifts_are_arithmetic[(-1 >> 1) == -1 ? 1 : -1];

typedef @ACTIVATION@ activation_t;
typedef @COLUMN@ column_t; /* an activation with its zero point taken off */
typedef @ACCUMULATOR@ accumulator_t;
typedef @INDEX@ index_t;

enum { COLUMNS = @COLUMNS@, MULTIPLIER_BITS = @MULTIPLIER_BITS@ };
enum { ROUNDING_SINGLE, ROUNDING_DOUBLE, ROUNDING_HALF_EVEN, ROUNDING_FLOOR };

/* Columns are padded with zeros to a multiple of STEP values, as vector instructions like them. */
#ifndef STEP
#if defined(__AVX2__)
#define STEP 32
#elif defined(__SSE2__) || defined(__ARM_NEON)
#define STEP 16
#else
#define STEP 1
#endif
#endif
#define PADDED(length) (((length) + STEP - 1) / STEP * STEP)

/* What this model needs. */
#define USES_ROUNDING_DOUBLE @DOUBLE@
#define USES_ROUNDING_HALF_EVEN @HALF_EVEN@
#define USES_ROUNDING_FLOOR @FLOOR@
#define USES_SHIFTS_TO_THE_LEFT @LEFT@
#define USES_WIDE_RESULTS @WIDE_RESULTS@
#define USES_PACKED_WEIGHTS @PACKED@

/* Names that do not meet those of another model. */
@NAMES@
