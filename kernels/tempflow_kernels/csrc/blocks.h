/* Operations on one block of elements in cache, compiled once per instruction set and chosen when the library loads.
 *
 * Buffers hold kPadded floats; operations may write up to the padding, never read results beyond `count`. */
#pragma once

#include <cstddef>
#include <cstdint>

namespace tempflow {

constexpr int64_t kBlock = 2048;  // elements per partial sum: part of the numeric contract
constexpr int64_t kPadded = kBlock + 64;

struct alignas(64) Buffer {
    float data[kPadded];
    operator float *() { return data; }
    operator const float *() const { return data; }
};

struct BlockOps {
    const char *name;
    /* `count` normal deviates from the Philox counter of the first one (a multiple of 4 into the draw). */
    void (*normal)(float *out, int64_t count, uint64_t seed, uint64_t counter);
    /* Values of a typed array, as fp32, and back (round to nearest even). */
    void (*load)(float *out, const void *data, int64_t type, int64_t first, int64_t count);
    void (*store)(void *data, int64_t type, int64_t first, const float *values, int64_t count);
    /* v = base + guidance (v - base) */
    void (*guide)(float *v, const float *base, float guidance, int64_t count);
    /* out = a x + b y */
    void (*combine)(float *out, float a, const float *x, float b, const float *y, int64_t count);
    /* out = x + a y, also in place */
    void (*add_scaled)(float *out, const float *x, float a, const float *y, int64_t count);
    void (*scale)(float *out, float a, int64_t count);
    /* sum of x y */
    double (*dot)(const float *x, const float *y, int64_t count);
    /* sum of ((x - y) / divisor)^2 */
    double (*squared_distance)(const float *x, const float *y, float divisor, int64_t count);
};

extern const BlockOps generic_ops;
#ifdef TEMPFLOW_X86
extern const BlockOps avx2_ops;
extern const BlockOps avx512_ops;
#endif

/* The best set that this processor can run. */
const BlockOps &ops();

}  // namespace tempflow
