/* Sampler step, log-density and branch loss of flow-matching reinforcement learning, for CPUs, without torch.
 *
 * Every sampler step is `next = x_coef x + v_coef v + std noise` with scalars per row. Shapes: `rows` R (one network
 * output each), `siblings` K that share a row, `elements` d of one latent. All arrays are contiguous, row-major.
 * Noise is a pure function of keys: Philox4x32-10 with counter = offset + sibling * ceil(d / 4) + i / 4, word i % 4,
 * uniform = fma(word, 2^-32, 2^-33), and Box-Muller pairs from words (0, 1) and (2, 3).
 *
 * Threads: each call runs on the calling thread and up to `threads - 1` more that live for that call only (no
 * OpenMP, no pool: nothing to clash with the runtime of the caller, nothing to break after fork). Partial sums belong
 * to fixed blocks of elements and are added in a fixed order: results do not depend on `threads`.
 *
 * Functions return 0, or 1 if memory or arguments did not allow the call. They never throw.
 */
#ifndef TEMPFLOW_KERNELS_H
#define TEMPFLOW_KERNELS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define TFK_ABI_VERSION 3

enum { TFK_FLOAT32 = 0, TFK_BFLOAT16 = 1, TFK_FLOAT16 = 2 };

/* An array of one of the types above; data = NULL means "not given" where that is allowed. */
typedef struct {
    const void *data;
    int64_t type;
} tfk_array;

/* The batch: coef (R, 3) holds x_coef, v_coef, std; std = 0 is an ODE row (the functions of the loss do not read it).
 * key (R, 2) holds seed and offset. */
typedef struct {
    const float *coef;
    const int64_t *key;
    int64_t rows, siblings, elements;
    int64_t threads;
} tfk_batch;

/* What the loss reads: arrays (R, d), velocity_ref may be NULL; noise (R, K, d) or NULL (then it is drawn from the
 * keys); terms (R, 4): weight, square, product, kl. A row with product = 0 reads no noise. */
typedef struct {
    tfk_array velocity, velocity_old, velocity_ref, noise;
    const float *terms;
    double kl_coef;
} tfk_branches;

int tfk_abi_version(void);

/* "avx512", "avx2" or "generic": the code path that this processor runs. */
const char *tfk_instruction_set(void);

/* Ten rounds of Philox4x32 (Random123). */
void tfk_philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t words[4]);

/* noise (R, K, d): standard normal deviates. */
int tfk_normal(const tfk_batch *batch, float *noise);

/* next (R, K, d) and log_prob (R, K), the mean over d of the Gaussian log-density, 0 for ODE rows. */
int tfk_transition_step(const tfk_batch *batch, tfk_array latents, tfk_array velocity, tfk_array velocity_uncond,
                        double guidance, float *next, float *log_prob);

/* log_prob (R, K) of given next latents (R, K, d). */
int tfk_transition_log_prob(const tfk_batch *batch, tfk_array next, tfk_array latents, tfk_array velocity,
                            float *log_prob);

/* gradient (R, d) = v_coef / (std^2 d) sum_j slopes_j (next_j - mean), slopes (R, K). */
int tfk_transition_log_prob_gradient(const tfk_batch *batch, tfk_array next, tfk_array latents, tfk_array velocity,
                                     const float *slopes, void *gradient, int64_t gradient_type);

/* log_ratio (R, K) = -(square mean(dv^2) + product mean(dv noise_j)), dv = v_old - v. */
int tfk_log_ratio(const tfk_batch *batch, const tfk_branches *branches, float *log_ratio);

/* loss (1) = mean of max(-g ratio, -g clip(ratio, 1 - clip_low, 1 + clip_high)) + kl_coef * mean of kl mean((v - v_ref)^2)
 * with g = weight * advantage; stats (7) = ratio mean, ratio max, clip fraction, approximate KL, KL to the reference,
 * mean and maximum of |log_ratio|; slopes (R, K) = d loss / d log_ratio. advantages (R, K). */
int tfk_branch_loss(const tfk_batch *batch, const tfk_branches *branches, const float *advantages, double clip_low,
                    double clip_high, float *loss, float *stats, float *slopes);

/* The same loss and stats, and with them gradient (R, d), fp32: d loss / d velocity. Draws every noise once where
 * tfk_branch_loss and tfk_velocity_gradient draw it twice. */
int tfk_branch_loss_gradient(const tfk_batch *batch, const tfk_branches *branches, const float *advantages,
                             double clip_low, double clip_high, float *loss, float *stats, float *gradient);

/* gradient (R, d) of `scale * loss` in velocity. */
int tfk_velocity_gradient(const tfk_batch *batch, const tfk_branches *branches, const float *slopes, double scale,
                          void *gradient, int64_t gradient_type);

#ifdef __cplusplus
}
#endif
#endif
