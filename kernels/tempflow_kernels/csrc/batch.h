/* Shared pieces of the operators: coefficients of a row, position of a block, noise of a sibling. */
#pragma once

#include <new>

#include "blocks.h"
#include "parallel.h"
#include "tempflow_kernels.h"

namespace tempflow {

struct Row {
    float x_coef, v_coef, std;
    bool stochastic() const { return std > 0; }
    double sensitivity() const { return stochastic() ? double(v_coef) / double(std) : 0.0; }
};

inline Row row_of(const tfk_batch &batch, int64_t row) {
    const float *coef = batch.coef + 3 * row;
    return {coef[0], coef[1], coef[2]};
}

/* What a method multiplies in the loss of a row. */
struct Terms {
    float weight, square, product, kl;
};

inline Terms terms_of(const tfk_branches &branches, int64_t row) {
    const float *terms = branches.terms + 4 * row;
    return {terms[0], terms[1], terms[2], terms[3]};
}

constexpr double kDraw = 0.8, kRead = 0.2;  // nanoseconds per normal deviate, per number read: orders of magnitude

inline int64_t blocks_of(const tfk_batch &batch) { return (batch.elements + kBlock - 1) / kBlock; }

/* Block number `item` of the batch, blocks of a row being neighbours. */
struct Place {
    int64_t row, first, count, flat;  // flat: position of the first element in an (R, d) array
    Place(const tfk_batch &batch, int64_t item) {
        row = item / blocks_of(batch);
        first = item % blocks_of(batch) * kBlock;
        count = std::min(kBlock, batch.elements - first);
        flat = row * batch.elements + first;
    }
    /* Position of the block in an (R, K, d) array. */
    int64_t sibling(const tfk_batch &batch, int64_t j) const {
        return (row * batch.siblings + j) * batch.elements + first;
    }
};

inline void draw(const tfk_batch &batch, const Place &place, int64_t sibling, float *noise) {
    const uint64_t seed = uint64_t(batch.key[2 * place.row]), offset = uint64_t(batch.key[2 * place.row + 1]);
    const uint64_t quads = uint64_t(batch.elements + 3) / 4;
    ops().normal(noise, place.count, seed, offset + uint64_t(sibling) * quads + uint64_t(place.first) / 4);
}

inline void load(float *out, tfk_array array, int64_t first, int64_t count) {
    ops().load(out, array.data, array.type, first, count);
}

inline bool valid(const tfk_batch &batch) { return batch.rows >= 1 && batch.siblings >= 1 && batch.elements >= 1; }

/* `columns` sums for every block of a valid batch, all 0; false if the batch is not valid or memory is short. */
inline bool allocate(std::vector<double> &partial, const tfk_batch &batch, int64_t columns) noexcept {
    if (!valid(batch)) return false;
    try {
        partial.assign(size_t(batch.rows * blocks_of(batch) * columns), 0.0);
    } catch (const std::exception &) {
        return false;
    }
    return true;
}

/* Rows [first, first + count) of a batch. */
struct Rows {
    int64_t first, count;
};

/* Every block of these rows; `cost`: about how many nanoseconds one element of one sibling takes. */
template <typename Task>
int for_each_block(const tfk_batch &batch, Rows rows, double cost, const Task &task) noexcept {
    if (!valid(batch)) return 1;
    try {
        const int64_t start = rows.first * blocks_of(batch), items = rows.count * blocks_of(batch);
        const double nanoseconds = cost * double(rows.count) * double(batch.siblings) * double(batch.elements);
        parallel_for(items, nanoseconds, batch.threads,
                     [&](int64_t item) { task(start + item, Place(batch, start + item)); });
    } catch (const std::exception &) {
        return 1;
    }
    return 0;
}

template <typename Task>
int for_each_block(const tfk_batch &batch, double cost, const Task &task) noexcept {
    return for_each_block(batch, {0, batch.rows}, cost, task);
}

/* Sum over the blocks of a row of column `column`, in order. */
inline double sum_blocks(const std::vector<double> &partial, const tfk_batch &batch, int64_t row, int64_t columns,
                         int64_t column) {
    double total = 0;
    const int64_t blocks = blocks_of(batch);
    for (int64_t block = 0; block < blocks; block++) total += partial[(row * blocks + block) * columns + column];
    return total;
}

}  // namespace tempflow
