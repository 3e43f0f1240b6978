/* Log-ratios, the branch loss and its gradient. */
#include <cmath>
#include <limits>

#include "batch.h"

using namespace tempflow;

namespace {

/* The guided velocity of a block. */
void load_velocity(const tfk_branches &in, const Place &place, float *v) {
    load(v, in.velocity, place.flat, place.count);
    if (!in.velocity_uncond.data) return;
    Buffer base;
    load(base, in.velocity_uncond, place.flat, place.count);
    ops().guide(v, base, float(in.guidance), place.count);
}

void load_delta(const tfk_branches &in, const Place &place, const float *v, float *delta) {
    load(delta, in.velocity_old, place.flat, place.count);
    ops().add_scaled(delta, delta, -1.0f, v, place.count);
}

void load_noise(const tfk_batch &batch, const tfk_branches &in, const Place &place, int64_t sibling, float *noise) {
    if (in.noise.data)
        load(noise, in.noise, place.sibling(batch, sibling), place.count);
    else
        draw(batch, place, sibling, noise);
}

/* Pass 1: per block the sums of delta^2, (v - v_ref)^2 and delta noise_j. */
int moments(const tfk_batch &batch, const tfk_branches &in, std::vector<double> &partial) {
    const int64_t columns = batch.siblings + 2;
    if (!allocate(partial, batch, columns)) return 1;
    return for_each_block(batch, [&](int64_t item, const Place &place) {
        double *sums = partial.data() + item * columns;
        Buffer v, delta, other;
        load_velocity(in, place, v);
        load_delta(in, place, v, delta);
        sums[0] = ops().dot(delta, delta, place.count);
        if (in.velocity_ref.data) {
            load(other, in.velocity_ref, place.flat, place.count);
            sums[1] = ops().squared_distance(v, other, 1.0f, place.count);
        }
        if (!row_of(batch, place.row).stochastic()) return;
        for (int64_t j = 0; j < batch.siblings; j++) {
            load_noise(batch, in, place, j, other);
            sums[2 + j] = ops().dot(delta, other, place.count);
        }
    });
}

double log_ratio_of(const tfk_batch &batch, const std::vector<double> &partial, int64_t row, int64_t sibling) {
    const double s = row_of(batch, row).sensitivity(), count = double(batch.elements);
    const double square = sum_blocks(partial, batch, row, batch.siblings + 2, 0) / count;
    const double product = sum_blocks(partial, batch, row, batch.siblings + 2, 2 + sibling) / count;
    return -(0.5 * s * s * square + s * product);
}

/* Mean over rows of the weighted KL to the reference policy. */
double reference_kl(const tfk_batch &batch, const tfk_branches &in, const std::vector<double> &partial) {
    double total = 0;
    for (int64_t row = 0; row < batch.rows; row++) {
        const double s = row_of(batch, row).sensitivity();
        const double square = sum_blocks(partial, batch, row, batch.siblings + 2, 1) / double(batch.elements);
        total += 0.5 * s * s * square * (in.kl_weights ? double(in.kl_weights[row]) : 1.0);
    }
    return total / double(batch.rows);
}

double greater(double a, double b) { return std::isnan(b) || b > a ? b : a; }

/* Sums and maxima over all branches. */
struct Tally {
    double surrogate = 0, excess = 0, outside = 0, rest = 0, magnitude = 0;
    double excess_max = -std::numeric_limits<double>::infinity(), magnitude_max = 0;

    /* Adds one branch; returns d surrogate / d log_ratio. */
    double add(double log_ratio, double gain, double low, double high) {
        const double value = std::expm1(log_ratio);
        const double free = -gain * value, clipped = -gain * std::min(std::max(value, -low), high);
        surrogate += (free < clipped ? clipped : free) - gain;
        excess += value;
        outside += value < -low || value > high ? 1.0 : 0.0;
        rest += value - log_ratio;
        magnitude += std::fabs(log_ratio);
        excess_max = greater(excess_max, value);
        magnitude_max = greater(magnitude_max, std::fabs(log_ratio));
        return free >= clipped ? -gain * (1.0 + value) : 0.0;
    }
};

}  // namespace

extern "C" {

int tfk_log_ratio(const tfk_batch *batch, const tfk_branches *branches, float *log_ratio) {
    std::vector<double> partial;
    if (moments(*batch, *branches, partial)) return 1;
    for (int64_t i = 0; i < batch->rows * batch->siblings; i++)
        log_ratio[i] = float(log_ratio_of(*batch, partial, i / batch->siblings, i % batch->siblings));
    return 0;
}

int tfk_branch_loss(const tfk_batch *batch, const tfk_branches *branches, const float *advantages,
                    const float *weights, float *loss, float *stats, float *slopes) {
    std::vector<double> partial;
    if (moments(*batch, *branches, partial)) return 1;
    const double count = double(batch->rows * batch->siblings);
    // The bounds as fp32 numbers, so that every backend clips at the same place.
    const double low = double(float(branches->clip_low)), high = double(float(branches->clip_high));
    Tally tally;
    for (int64_t i = 0; i < batch->rows * batch->siblings; i++) {
        const int64_t row = i / batch->siblings;
        const double gain = double(weights[row] * advantages[i]);
        slopes[i] = float(tally.add(log_ratio_of(*batch, partial, row, i % batch->siblings), gain, low, high) / count);
    }
    const double kl = branches->velocity_ref.data ? reference_kl(*batch, *branches, partial) : 0.0;
    *loss = float(tally.surrogate / count + branches->kl_coef * kl);
    const double values[7] = {1 + tally.excess / count, 1 + tally.excess_max, tally.outside / count, tally.rest / count,
                              kl, tally.magnitude / count, tally.magnitude_max};
    for (int i = 0; i < 7; i++) stats[i] = float(values[i]);
    return 0;
}

int tfk_velocity_gradient(const tfk_batch *batch, const tfk_branches *branches, const float *slopes, double scale,
                          void *gradient, int64_t gradient_type, void *uncond_gradient, int64_t uncond_type) {
    const tfk_branches &in = *branches;
    return for_each_block(*batch, [&](int64_t, const Place &place) {
        const double s = row_of(*batch, place.row).sensitivity(), factor = scale * s / double(batch->elements);
        const float *slope = slopes + place.row * batch->siblings;
        double slope_sum = 0;
        Buffer v, delta, other, total = {};
        load_velocity(in, place, v);
        load_delta(in, place, v, delta);
        for (int64_t j = 0; s != 0 && j < batch->siblings; j++) {
            load_noise(*batch, in, place, j, other);
            ops().add_scaled(total, total, slope[j], other, place.count);
            slope_sum += double(slope[j]);
        }
        ops().combine(other, float(factor), total, float(factor * s * slope_sum), delta, place.count);
        if (in.velocity_ref.data && in.kl_coef != 0) {
            const double weight = in.kl_weights ? double(in.kl_weights[place.row]) : 1.0;
            load(total, in.velocity_ref, place.flat, place.count);
            ops().add_scaled(total, v, -1.0f, total, place.count);
            ops().add_scaled(other, other, float(factor * s * in.kl_coef * weight / double(batch->rows)), total,
                             place.count);
        }
        if (uncond_gradient) {
            ops().combine(total, float(1.0 - in.guidance), other, 0.0f, other, place.count);
            ops().store(uncond_gradient, uncond_type, place.flat, total, place.count);
            ops().scale(other, float(in.guidance), place.count);
        }
        ops().store(gradient, gradient_type, place.flat, other, place.count);
    });
}

}  // extern "C"
