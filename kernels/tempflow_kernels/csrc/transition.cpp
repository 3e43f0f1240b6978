/* The sampler step, its log-density, and the noise itself. */
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "batch.h"

using namespace tempflow;

namespace {

/* TEMPFLOW_KERNELS_INSTRUCTION_SET = avx2 | generic asks for a lesser path, for tests and comparisons. */
bool allowed(const char *name) {
    const char *wanted = std::getenv("TEMPFLOW_KERNELS_INSTRUCTION_SET");
    return !wanted || std::strcmp(wanted, name) == 0;
}

const BlockOps &best_ops() {
#ifdef TEMPFLOW_X86
    const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    if (has_avx512 && allowed("avx512")) return avx512_ops;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && allowed("avx2")) return avx2_ops;
#endif
    return generic_ops;
}

}  // namespace

const BlockOps &tempflow::ops() {
    static const BlockOps &chosen = best_ops();
    return chosen;
}

namespace {

/* log_prob (R, K) from partial sums of squared standardised residuals. */
void finish_log_prob(const tfk_batch &batch, const std::vector<double> &partial, float *log_prob) {
    constexpr double kHalfLogTwoPi = 0.91893853320467274178;
    for (int64_t row = 0; row < batch.rows; row++) {
        const Row coef = row_of(batch, row);
        for (int64_t j = 0; j < batch.siblings; j++) {
            const double square = sum_blocks(partial, batch, row, batch.siblings, j) / double(batch.elements);
            const double value = -0.5 * square - std::log(double(coef.std)) - kHalfLogTwoPi;
            log_prob[row * batch.siblings + j] = coef.stochastic() ? float(value) : 0.0f;
        }
    }
}

void load_mean(const tfk_batch &batch, const Place &place, tfk_array latents, const float *velocity, float *mean) {
    const Row coef = row_of(batch, place.row);
    Buffer x;
    load(x, latents, place.flat, place.count);
    ops().combine(mean, coef.x_coef, x, coef.v_coef, velocity, place.count);
}

}  // namespace

extern "C" {

int tfk_abi_version(void) { return TFK_ABI_VERSION; }

const char *tfk_instruction_set(void) { return ops().name; }

void tfk_philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t words[4]) {
    uint32_t w[4] = {counter[0], counter[1], counter[2], counter[3]}, key0 = key[0], key1 = key[1];
    for (int round = 0; round < 10; round++, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u) {
        const uint64_t p0 = uint64_t(0xD2511F53u) * w[0], p1 = uint64_t(0xCD9E8D57u) * w[2];
        const uint32_t next[4] = {uint32_t(p1 >> 32) ^ w[1] ^ key0, uint32_t(p1), uint32_t(p0 >> 32) ^ w[3] ^ key1,
                                  uint32_t(p0)};
        std::copy(next, next + 4, w);
    }
    std::copy(w, w + 4, words);
}

int tfk_normal(const tfk_batch *batch, float *noise) {
    return for_each_block(*batch, kDraw, [&](int64_t, const Place &place) {
        Buffer drawn;
        for (int64_t j = 0; j < batch->siblings; j++) {
            draw(*batch, place, j, drawn);
            std::copy(drawn.data, drawn.data + place.count, noise + place.sibling(*batch, j));
        }
    });
}

int tfk_transition_step(const tfk_batch *batch, tfk_array latents, tfk_array velocity, tfk_array velocity_uncond,
                        double guidance, float *next, float *log_prob) {
    std::vector<double> partial;
    if (!allocate(partial, *batch, batch->siblings)) return 1;
    const int status = for_each_block(*batch, kDraw, [&](int64_t item, const Place &place) {
        const Row coef = row_of(*batch, place.row);
        Buffer v, base, mean, noise;
        load(v, velocity, place.flat, place.count);
        if (velocity_uncond.data) {
            load(base, velocity_uncond, place.flat, place.count);
            ops().guide(v, base, float(guidance), place.count);
        }
        load_mean(*batch, place, latents, v, mean);
        for (int64_t j = 0; j < batch->siblings; j++) {
            float *target = next + place.sibling(*batch, j);
            if (!coef.stochastic()) {
                std::copy(mean.data, mean.data + place.count, target);
                continue;
            }
            draw(*batch, place, j, noise);
            ops().add_scaled(target, mean, coef.std, noise, place.count);
            partial[size_t(item * batch->siblings + j)] = ops().dot(noise, noise, place.count);
        }
    });
    if (status == 0) finish_log_prob(*batch, partial, log_prob);
    return status;
}

int tfk_transition_log_prob(const tfk_batch *batch, tfk_array next, tfk_array latents, tfk_array velocity,
                            float *log_prob) {
    std::vector<double> partial;
    if (!allocate(partial, *batch, batch->siblings)) return 1;
    const int status = for_each_block(*batch, kRead, [&](int64_t item, const Place &place) {
        const Row coef = row_of(*batch, place.row);
        Buffer v, mean, following;
        load(v, velocity, place.flat, place.count);
        load_mean(*batch, place, latents, v, mean);
        for (int64_t j = 0; j < batch->siblings; j++) {
            load(following, next, place.sibling(*batch, j), place.count);
            const float divisor = coef.stochastic() ? coef.std : 1.0f;
            partial[size_t(item * batch->siblings + j)] =
                ops().squared_distance(following, mean, divisor, place.count);
        }
    });
    if (status == 0) finish_log_prob(*batch, partial, log_prob);
    return status;
}

int tfk_transition_log_prob_gradient(const tfk_batch *batch, tfk_array next, tfk_array latents, tfk_array velocity,
                                     const float *slopes, void *gradient, int64_t gradient_type) {
    return for_each_block(*batch, kRead, [&](int64_t, const Place &place) {
        const Row coef = row_of(*batch, place.row);
        const double divisor = coef.stochastic() ? double(coef.std) : 1.0;
        Buffer v, mean, following, total = {};
        load(v, velocity, place.flat, place.count);
        load_mean(*batch, place, latents, v, mean);
        for (int64_t j = 0; j < batch->siblings; j++) {
            load(following, next, place.sibling(*batch, j), place.count);
            ops().add_scaled(following, following, -1.0f, mean, place.count);
            ops().add_scaled(total, total, slopes[place.row * batch->siblings + j], following, place.count);
        }
        ops().scale(total, float(coef.sensitivity() / divisor / double(batch->elements)), place.count);
        ops().store(gradient, gradient_type, place.flat, total, place.count);
    });
}

}  // extern "C"
