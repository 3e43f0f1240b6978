/* Log-ratios, the branch loss and its gradient. */
#include <cmath>
#include <limits>
#include <memory>

#include "batch.h"

using namespace tempflow;

namespace {

void load_delta(const tfk_branches &in, const Place &place, const float *v, float *delta) {
    load(delta, in.velocity_old, place.flat, place.count);
    ops().add_scaled(delta, delta, -1.0f, v, place.count);
}

/* Drawn noise of a few rows, kept from the first pass for the second where it stays in cache. */
class Kept {
  public:
    Kept(const tfk_batch &batch, const tfk_branches &in) : siblings(batch.siblings), rows(batch.rows) {
        const int64_t row = blocks_of(batch) * siblings * kPadded;
        if (in.noise.data || row > kMost) return;
        rows = std::max(int64_t(1), std::min(batch.rows, kUsual / row));
        data.reset(new float[size_t(rows * row)]);
    }
    /* How many rows one turn of both passes takes: all of them where nothing is kept. */
    int64_t rows_per_turn() const { return rows; }
    /* Where the noise of a block is kept, `item` counting from the first row of the turn; NULL: nowhere. */
    float *at(int64_t item, int64_t sibling) const {
        return data ? data.get() + (item * siblings + sibling) * kPadded : nullptr;
    }

  private:
    static constexpr int64_t kUsual = 1 << 19, kMost = 1 << 21;  // 2 MiB a turn, 8 MiB where one row needs it
    int64_t siblings, rows;
    std::unique_ptr<float[]> data;
};

/* The noise of a block, drawn or read into `target`. */
void load_noise(const tfk_batch &batch, const tfk_branches &in, const Place &place, int64_t sibling, float *target) {
    if (in.noise.data)
        load(target, in.noise, place.sibling(batch, sibling), place.count);
    else
        draw(batch, place, sibling, target);
}

double cost_of(const tfk_branches &in) { return in.noise.data ? kRead : kDraw; }

/* Pass 1: per block the sums of delta^2, (v - v_ref)^2 and delta noise_j. */
int moments(const tfk_batch &batch, const tfk_branches &in, Rows rows, const Kept *kept, std::vector<double> &partial) {
    const int64_t columns = batch.siblings + 2, start = rows.first * blocks_of(batch);
    return for_each_block(batch, rows, cost_of(in), [&](int64_t item, const Place &place) {
        double *sums = partial.data() + item * columns;
        Buffer v, delta, other;
        load(v, in.velocity, place.flat, place.count);
        load_delta(in, place, v, delta);
        sums[0] = ops().dot(delta, delta, place.count);
        if (in.velocity_ref.data) {
            load(other, in.velocity_ref, place.flat, place.count);
            sums[1] = ops().squared_distance(v, other, 1.0f, place.count);
        }
        if (terms_of(in, place.row).product == 0) return;
        for (int64_t j = 0; j < batch.siblings; j++) {
            float *place_kept = kept ? kept->at(item - start, j) : nullptr, *noise = place_kept ? place_kept : other;
            load_noise(batch, in, place, j, noise);
            sums[2 + j] = ops().dot(delta, noise, place.count);
        }
    });
}

int moments(const tfk_batch &batch, const tfk_branches &in, std::vector<double> &partial) {
    if (!allocate(partial, batch, batch.siblings + 2)) return 1;
    return moments(batch, in, {0, batch.rows}, nullptr, partial);
}

/* Pass 2 on one block: the gradient of `scale * loss` in the velocity, into `out`. */
struct Gradient {
    const tfk_batch &batch;
    const tfk_branches &in;
    double scale;

    /* noise(j, buffer): the noise of sibling j, drawn into `buffer` or kept elsewhere; slope: the K slopes of the row. */
    template <typename Noise>
    void operator()(const Place &place, const float *slope, const Noise &noise, float *out) const {
        const Terms terms = terms_of(in, place.row);
        const double share = scale / double(batch.elements);
        double slope_sum = 0;
        Buffer v, delta, total = {};
        load(v, in.velocity, place.flat, place.count);
        load_delta(in, place, v, delta);
        for (int64_t j = 0; j < batch.siblings; j++) {
            if (terms.product != 0) ops().add_scaled(total, total, slope[j], noise(j, out), place.count);
            slope_sum += double(slope[j]);
        }
        const double along = 2 * double(terms.square) * slope_sum;
        ops().combine(out, float(share * double(terms.product)), total, float(share * along), delta, place.count);
        if (!in.velocity_ref.data || in.kl_coef == 0) return;
        const double pull = 2 * in.kl_coef * double(terms.kl) / double(batch.rows);
        load(total, in.velocity_ref, place.flat, place.count);
        ops().add_scaled(total, v, -1.0f, total, place.count);
        ops().add_scaled(out, out, float(share * pull), total, place.count);
    }
};

double log_ratio_of(const tfk_batch &batch, const tfk_branches &in, const std::vector<double> &partial, int64_t row,
                    int64_t sibling) {
    const Terms terms = terms_of(in, row);
    const double square = sum_blocks(partial, batch, row, batch.siblings + 2, 0);
    const double product = sum_blocks(partial, batch, row, batch.siblings + 2, 2 + sibling);
    return -(double(terms.square) * square + double(terms.product) * product) / double(batch.elements);
}

/* Mean over rows of the weighted KL to the reference policy. */
double reference_kl(const tfk_batch &batch, const tfk_branches &in, const std::vector<double> &partial) {
    double total = 0;
    for (int64_t row = 0; row < batch.rows; row++)
        total += double(terms_of(in, row).kl) * sum_blocks(partial, batch, row, batch.siblings + 2, 1);
    return total / double(batch.rows * batch.elements);
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

/* The branch loss from finished log-ratios, row after row. */
class Objective {
  public:
    Objective(const tfk_batch &batch, const tfk_branches &in, const float *advantages, double clip_low,
              double clip_high)
        : batch(batch), in(in), advantages(advantages),
          // The bounds as fp32 numbers, so that every backend clips at the same place.
          low(double(float(clip_low))), high(double(float(clip_high))) {}

    /* Adds some rows and writes their slopes, (rows, K). */
    void add(const std::vector<double> &partial, Rows rows, float *slopes) {
        for (int64_t i = rows.first * batch.siblings; i < (rows.first + rows.count) * batch.siblings; i++) {
            const int64_t row = i / batch.siblings;
            const double gain = double(terms_of(in, row).weight * advantages[i]);
            const double ratio = log_ratio_of(batch, in, partial, row, i % batch.siblings);
            *slopes++ = float(tally.add(ratio, gain, low, high) / count());
        }
    }

    void finish(const std::vector<double> &partial, float *loss, float *stats) const {
        const double kl = in.velocity_ref.data ? reference_kl(batch, in, partial) : 0.0;
        *loss = float(tally.surrogate / count() + in.kl_coef * kl);
        const double values[7] = {1 + tally.excess / count(), 1 + tally.excess_max, tally.outside / count(),
                                  tally.rest / count(), kl, tally.magnitude / count(), tally.magnitude_max};
        for (int i = 0; i < 7; i++) stats[i] = float(values[i]);
    }

  private:
    double count() const { return double(batch.rows * batch.siblings); }
    const tfk_batch &batch;
    const tfk_branches &in;
    const float *advantages;
    double low, high;
    Tally tally;
};

/* Loss and gradient, a few rows at a time. */
int loss_and_gradient(const tfk_batch &batch, const tfk_branches &in, Objective &objective,
                      std::vector<double> &partial, float *gradient) {
    const Kept kept(batch, in);
    const Gradient gradient_of{batch, in, 1.0};
    std::vector<float> slopes(size_t(kept.rows_per_turn() * batch.siblings));
    for (int64_t first = 0; first < batch.rows; first += kept.rows_per_turn()) {
        const Rows rows{first, std::min(kept.rows_per_turn(), batch.rows - first)};
        if (moments(batch, in, rows, &kept, partial)) return 1;
        objective.add(partial, rows, slopes.data());
        const double cost = kept.at(0, 0) ? kRead : cost_of(in);
        const int status = for_each_block(batch, rows, cost, [&](int64_t item, const Place &place) {
            const auto noise = [&](int64_t j, float *buffer) -> const float * {
                if (const float *drawn = kept.at(item - first * blocks_of(batch), j)) return drawn;
                load_noise(batch, in, place, j, buffer);
                return buffer;
            };
            Buffer out;
            gradient_of(place, slopes.data() + (place.row - first) * batch.siblings, noise, out);
            ops().store(gradient, TFK_FLOAT32, place.flat, out, place.count);
        });
        if (status) return status;
    }
    return 0;
}

}  // namespace

extern "C" {

int tfk_log_ratio(const tfk_batch *batch, const tfk_branches *branches, float *log_ratio) {
    std::vector<double> partial;
    if (moments(*batch, *branches, partial)) return 1;
    for (int64_t i = 0; i < batch->rows * batch->siblings; i++)
        log_ratio[i] = float(log_ratio_of(*batch, *branches, partial, i / batch->siblings, i % batch->siblings));
    return 0;
}

int tfk_branch_loss(const tfk_batch *batch, const tfk_branches *branches, const float *advantages, double clip_low,
                    double clip_high, float *loss, float *stats, float *slopes) {
    std::vector<double> partial;
    if (moments(*batch, *branches, partial)) return 1;
    Objective objective(*batch, *branches, advantages, clip_low, clip_high);
    objective.add(partial, {0, batch->rows}, slopes);
    objective.finish(partial, loss, stats);
    return 0;
}

int tfk_branch_loss_gradient(const tfk_batch *batch, const tfk_branches *branches, const float *advantages,
                             double clip_low, double clip_high, float *loss, float *stats, float *gradient) {
    std::vector<double> partial;
    if (!allocate(partial, *batch, batch->siblings + 2)) return 1;
    Objective objective(*batch, *branches, advantages, clip_low, clip_high);
    try {
        if (loss_and_gradient(*batch, *branches, objective, partial, gradient)) return 1;
    } catch (const std::exception &) {
        return 1;
    }
    objective.finish(partial, loss, stats);
    return 0;
}

int tfk_velocity_gradient(const tfk_batch *batch, const tfk_branches *branches, const float *slopes, double scale,
                          void *gradient, int64_t gradient_type) {
    const Gradient gradient_of{*batch, *branches, scale};
    return for_each_block(*batch, cost_of(*branches), [&](int64_t, const Place &place) {
        Buffer out;
        const auto noise = [&](int64_t j, float *buffer) {
            load_noise(*batch, *branches, place, j, buffer);
            return buffer;
        };
        gradient_of(place, slopes + place.row * batch->siblings, noise, out);
        ops().store(gradient, gradient_type, place.flat, out, place.count);
    });
}

}  // extern "C"
