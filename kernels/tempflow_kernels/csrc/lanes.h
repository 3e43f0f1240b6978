/* Vectors of W floats and the arithmetic of the noise on them. Included once per instruction set, with internal
 * linkage, and free of standard-library templates: code compiled for one instruction set must never be merged by the
 * linker into the path of another. */
#pragma once

#include <cstdint>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float F __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef uint64_t L __attribute__((vector_size(4 * W)));  // W / 2 lanes, each a 32-bit word in its low half

struct Unaligned {
    F value __attribute__((packed, aligned(4)));
};

inline F load(const float *p) { return reinterpret_cast<const Unaligned *>(p)->value; }
inline void store(float *p, F v) { reinterpret_cast<Unaligned *>(p)->value = v; }
inline F splat(float v) { return v - F{}; }

#if defined(__AVX512F__)
inline L multiply(L a, L b) { return (L)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
inline F fma(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline F sqrt(F a) { return (F)_mm512_sqrt_ps((__m512)a); }
#elif defined(__AVX2__)
inline L multiply(L a, L b) { return (L)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
inline F fma(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
inline F sqrt(F a) { return (F)_mm256_sqrt_ps((__m256)a); }
#else
#if defined(__SSE2__)
inline L multiply(L a, L b) { return (L)_mm_mul_epu32((__m128i)a, (__m128i)b); }
inline F sqrt(F a) { return (F)_mm_sqrt_ps((__m128)a); }
#else
inline L multiply(L a, L b) { return (a & 0xffffffffu) * (b & 0xffffffffu); }
inline F sqrt(F a) {
    for (int i = 0; i < W; i++) a[i] = __builtin_sqrtf(a[i]);
    return a;
}
#endif
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
inline F fma(F a, F b, F c) {
    for (int i = 0; i < W; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
}
#else
/* Without the instruction: two roundings, which moves a normal deviate by an ulp or two. */
inline F fma(F a, F b, F c) { return a * b + c; }
#endif
#endif

inline F fma(F a, F b, float c) { return fma(a, b, splat(c)); }
inline F fma(F a, float b, F c) { return fma(a, splat(b), c); }
inline F fma(F a, float b, float c) { return fma(a, splat(b), splat(c)); }

/* One Philox word of W consecutive counters: even counters and odd counters apart, so that the 32 x 32 -> 64 bit
 * product needs no shuffles. Upper halves of the lanes hold rubbish between rounds; the product ignores them. */
struct Word {
    L even, odd;
};

inline U packed(Word w) { return (U)((w.even & 0xffffffffull) | (w.odd << 32)); }

/* The ten round keys of a seed. */
struct RoundKeys {
    uint64_t first[10], second[10];
    explicit RoundKeys(uint64_t seed) {
        uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
        for (int round = 0; round < 10; round++, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u)
            first[round] = key0, second[round] = key1;
    }
};

inline void philox_round(Word w[4], uint64_t key0, uint64_t key1) {
    const L m0 = 0xD2511F53ull - L{}, m1 = 0xCD9E8D57ull - L{};
    const Word p0 = {multiply(w[0].even, m0), multiply(w[0].odd, m0)};
    const Word p1 = {multiply(w[2].even, m1), multiply(w[2].odd, m1)};
    w[0] = {(p1.even >> 32) ^ w[1].even ^ key0, (p1.odd >> 32) ^ w[1].odd ^ key0};
    w[2] = {(p0.even >> 32) ^ w[3].even ^ key1, (p0.odd >> 32) ^ w[3].odd ^ key1};
    w[1] = p1;
    w[3] = p0;
}

/* Words of the counters `counter` .. `counter + W - 1`. */
inline void philox(const RoundKeys &keys, uint64_t counter, U out[4]) {
    L step;
    for (int i = 0; i < W / 2; i++) step[i] = 2 * i;
    const L even = counter + step, odd = even + 1;
    Word w[4] = {{even, odd}, {even >> 32, odd >> 32}, {}, {}};
#pragma GCC unroll 10
    for (int round = 0; round < 10; round++) philox_round(w, keys.first[round], keys.second[round]);
    for (int i = 0; i < 4; i++) out[i] = packed(w[i]);
}

/* log(u) for u in (0, 1]: exponent * ln 2 + log(1 + f), 1 + f in [sqrt(1/2), sqrt(2)); within 1 ulp. */
inline F log_uniform(F u) {
    const I shifted = (I)u - 0x3F3504F3;
    const F exponent = __builtin_convertvector(shifted >> 23, F);
    const F f = (F)((shifted & 0x007FFFFF) + 0x3F3504F3) - 1.0f;
    F p = fma(f, -0.07634429633617401f, 0.12761549651622772f);
    p = fma(f, p, -0.131601944565773f);
    p = fma(f, p, 0.14201761782169342f);
    p = fma(f, p, -0.16623356938362122f);
    p = fma(f, p, 0.20001226663589478f);
    p = fma(f, p, -0.250008225440979f);
    p = fma(f, p, 0.3333333134651184f);
    const F square = f * f;
    F tail = fma(exponent, -1.9046542121259336e-09f, (f * square) * p);
    tail = fma(square, -0.5f, tail);
    return fma(exponent, 0.6931471824645996f, f + tail);
}

/* sin and cos of an angle in (0, 2 pi]: absolute error below 1e-7, within 1.5 ulp of the result. */
inline void sin_cos(F angle, F &sine, F &cosine) {
    const F shifted = fma(angle, 0.6366197466850281f, 12582912.0f);  // 1.5 * 2^23: rounds to an integer in the low bits
    const I quadrant = (I)shifted;
    const F count = shifted - 12582912.0f;
    F x = fma(count, -1.5707963705062866f, angle);
    x = fma(count, 4.371138828673793e-08f, x);
    const F square = x * x;
    F s = fma(square, -0.000195144530152902f, 0.008332154713571072f);
    s = fma(square, s, -0.16666655242443085f);
    s = fma(x * square, s, x);
    F c = fma(square, 2.443220728309825e-05f, -0.0013887308305129409f);
    c = fma(square, c, 0.04166664555668831f);
    c = fma(square * square, c, fma(square, -0.5f, 1.0f));
    const I odd = -(quadrant & 1);
    const I swapped_sine = (odd & (I)c) | (~odd & (I)s), swapped_cosine = (odd & (I)s) | (~odd & (I)c);
    sine = (F)(swapped_sine ^ ((quadrant & 2) << 30));
    cosine = (F)(swapped_cosine ^ (((quadrant + 1) & 2) << 30));
}

inline F uniform(U word) { return fma(__builtin_convertvector(word, F), 2.3283064365386963e-10f, 1.1641532182693481e-10f); }

inline void box_muller(U first, U second, F &a, F &b) {
    const F radius = sqrt(-2.0f * log_uniform(uniform(first)));
    F sine, cosine;
    sin_cos(6.2831854820251465f * uniform(second), sine, cosine);
    a = radius * cosine;
    b = radius * sine;
}

/* {a0, b0, a1, b1, ...} of the lower and of the upper halves. */
#if defined(__AVX512F__)
inline F zip_low(F a, F b) { return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23); }
inline F zip_high(F a, F b) { return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31); }
#elif defined(__AVX2__)
inline F zip_low(F a, F b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
inline F zip_high(F a, F b) { return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
#else
inline F zip_low(F a, F b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
inline F zip_high(F a, F b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
#endif

/* 4 W consecutive normal deviates from the words of W counters. */
inline void normals(float *out, const U words[4]) {
    F n0, n1, n2, n3;
    box_muller(words[0], words[1], n0, n1);
    box_muller(words[2], words[3], n2, n3);
    const F low02 = zip_low(n0, n2), low13 = zip_low(n1, n3), high02 = zip_high(n0, n2), high13 = zip_high(n1, n3);
    store(out, zip_low(low02, low13));
    store(out + W, zip_high(low02, low13));
    store(out + 2 * W, zip_low(high02, high13));
    store(out + 3 * W, zip_high(high02, high13));
}

}  // namespace
