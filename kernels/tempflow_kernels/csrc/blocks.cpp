/* The block operations for one instruction set; built with TEMPFLOW_OPS = the name of the table it defines. */
#include "blocks.h"

#include "lanes.h"
#include "tempflow_kernels.h"

namespace {

using tempflow::kPadded;

inline float from_bits(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t to_bits(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    return bits;
}

/* Half to float: shift the mantissa into place and rescale, which also handles subnormals; exponent 31 is inf or NaN. */
inline float from_half(uint16_t half) {
    const uint32_t magnitude = uint32_t(half & 0x7fff) << 13;
    const uint32_t scaled = to_bits(from_bits(magnitude) * 0x1p112f);
    const uint32_t special = magnitude | 0x7f800000u;
    return from_bits((magnitude >= 0x0f800000u ? special : scaled) | uint32_t(half & 0x8000) << 16);
}

/* Float to half, round to nearest even. Below 2^-14 the addition of 0.5 rounds at the half's subnormal spacing. */
inline uint16_t to_half(float value) {
    const uint32_t bits = to_bits(value), magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
    const uint32_t tiny = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t big = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t finite = magnitude < 0x38800000u ? tiny : normal;
    return uint16_t((magnitude >= 0x477ff000u ? big : finite) | (bits >> 16 & 0x8000u));
}

inline uint16_t to_bfloat(float value) {
    const uint32_t bits = to_bits(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
    return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16 | 0x40u) : rounded);
}

/* `count` is at most a block. All words first, then all deviates: two short loops, of which the processor overlaps more turns than of one long. */
void normal(float *out, int64_t count, uint64_t seed, uint64_t counter) {
    const RoundKeys keys(seed);
    U words[kPadded / W];
    U *next = words;
    for (int64_t i = 0; i < count; i += 4 * W, next += 4) philox(keys, counter + uint64_t(i / 4), next);
    next = words;
    for (int64_t i = 0; i < count; i += 4 * W, next += 4) normals(out + i, next);
}

void load_values(float *out, const void *data, int64_t type, int64_t first, int64_t count) {
    if (type == TFK_FLOAT32) {
        __builtin_memcpy(out, static_cast<const float *>(data) + first, size_t(count) * 4);
        return;
    }
    const uint16_t *words = static_cast<const uint16_t *>(data) + first;
    if (type == TFK_BFLOAT16)
        for (int64_t i = 0; i < count; i++) out[i] = from_bits(uint32_t(words[i]) << 16);
    else
        for (int64_t i = 0; i < count; i++) out[i] = from_half(words[i]);
}

void store_values(void *data, int64_t type, int64_t first, const float *values, int64_t count) {
    if (type == TFK_FLOAT32) {
        __builtin_memcpy(static_cast<float *>(data) + first, values, size_t(count) * 4);
        return;
    }
    uint16_t *words = static_cast<uint16_t *>(data) + first;
    if (type == TFK_BFLOAT16)
        for (int64_t i = 0; i < count; i++) words[i] = to_bfloat(values[i]);
    else
        for (int64_t i = 0; i < count; i++) words[i] = to_half(values[i]);
}

void guide(float *__restrict v, const float *__restrict base, float guidance, int64_t count) {
    for (int64_t i = 0; i < count; i++) v[i] = base[i] + guidance * (v[i] - base[i]);
}

void combine(float *__restrict out, float a, const float *__restrict x, float b, const float *__restrict y,
             int64_t count) {
    for (int64_t i = 0; i < count; i++) out[i] = a * x[i] + b * y[i];
}

void add_scaled(float *out, const float *x, float a, const float *__restrict y, int64_t count) {
    int64_t i = 0;
    for (; i + W <= count; i += W) store(out + i, load(x + i) + a * load(y + i));
    for (; i < count; i++) out[i] = x[i] + a * y[i];
}

void scale(float *out, float a, int64_t count) {
    for (int64_t i = 0; i < count; i++) out[i] *= a;
}

inline double lane_sum(F sum) {
    double total = 0;
    for (int i = 0; i < W; i++) total += double(sum[i]);
    return total;
}

double dot(const float *x, const float *y, int64_t count) {
    F first = {}, second = {};
    int64_t i = 0;
    for (; i + 2 * W <= count; i += 2 * W) {
        first = fma(load(x + i), load(y + i), first);
        second = fma(load(x + i + W), load(y + i + W), second);
    }
    double total = lane_sum(first) + lane_sum(second);
    for (; i < count; i++) total += double(x[i]) * double(y[i]);
    return total;
}

double squared_distance(const float *x, const float *y, float divisor, int64_t count) {
    F sum = {};
    int64_t i = 0;
    for (; i + W <= count; i += W) {
        const F distance = (load(x + i) - load(y + i)) / divisor;
        sum = fma(distance, distance, sum);
    }
    double total = lane_sum(sum);
    for (; i < count; i++) {
        const double distance = double((x[i] - y[i]) / divisor);
        total += distance * distance;
    }
    return total;
}

}  // namespace

#define TEMPFLOW_TEXT_(x) #x
#define TEMPFLOW_TEXT(x) TEMPFLOW_TEXT_(x)

extern const tempflow::BlockOps tempflow::TEMPFLOW_OPS = {
    TEMPFLOW_TEXT(TEMPFLOW_NAME), normal, load_values, store_values, guide, combine, add_scaled, scale, dot,
    squared_distance,
};
