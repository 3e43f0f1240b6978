/* Tests of the C interface without Python: `test_native CASE`, one case per ctest entry. */
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "tempflow_kernels.h"

namespace {

using Words = std::vector<uint32_t>;
using Floats = std::vector<float>;

bool failed = false;

void check(bool condition, const char *what, double found = 0) {
    if (condition) return;
    failed = true;
    std::printf("failed: %s (%.9g)\n", what, found);
}

Words philox(const Words &counter, const Words &key) {
    Words words(4);
    tfk_philox4x32(counter.data(), key.data(), words.data());
    return words;
}

/* Known answers of Random123 (kat_vectors, philox4x32 with 10 rounds). */
void test_philox() {
    check(philox({0, 0, 0, 0}, {0, 0}) == Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}, "all zeros");
    const uint32_t f = 0xffffffff;
    check(philox({f, f, f, f}, {f, f}) == Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}, "all ones");
    check(philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}) ==
              Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1},
          "digits of pi");
}

struct Case {
    int64_t rows = 2, siblings = 3, elements = 5003, threads = 2;
    Floats coef{0.9f, -0.1f, 0.3f, 1.0f, -0.1f, 0.0f};
    std::vector<int64_t> key{0x0123456789abcdef, 0xfffffffe, -5, 7};
    tfk_batch batch() const { return {coef.data(), key.data(), rows, siblings, elements, threads}; }
};

Floats normal(const Case &c) {
    Floats noise(size_t(c.rows * c.siblings * c.elements));
    const tfk_batch batch = c.batch();
    check(tfk_normal(&batch, noise.data()) == 0, "tfk_normal status");
    return noise;
}

double deviate(uint32_t first, uint32_t second, bool sine) {
    const double u = double(std::fma(float(first), 0x1p-32f, 0x1p-33f));
    const float angle = 6.2831854820251465f * std::fma(float(second), 0x1p-32f, 0x1p-33f);
    return std::sqrt(-2 * std::log(u)) * (sine ? std::sin(double(angle)) : std::cos(double(angle)));
}

/* Every number against the words of the scalar generator and double-precision logarithm, sine and cosine. */
void test_normal() {
    const Case c;
    const Floats noise = normal(c);
    double worst = 0;
    for (size_t i = 0; i < noise.size(); i++) {
        const int64_t draw = int64_t(i) / c.elements, element = int64_t(i) % c.elements, row = draw / c.siblings;
        const uint64_t seed = uint64_t(c.key[size_t(2 * row)]);
        const uint64_t counter = uint64_t(c.key[size_t(2 * row + 1)]) +
                                 uint64_t(draw % c.siblings) * uint64_t((c.elements + 3) / 4) + uint64_t(element / 4);
        const Words words = philox({uint32_t(counter), uint32_t(counter >> 32), 0, 0},
                                   {uint32_t(seed), uint32_t(seed >> 32)});
        const size_t pair = size_t(element % 4 / 2 * 2);
        const double expected = deviate(words[pair], words[pair + 1], element % 2 == 1);
        worst = std::fmax(worst, std::fabs(double(noise[i]) - expected));
    }
    check(worst < 6e-7, "distance from double-precision deviates", worst);
}

/* A draw does not depend on how many elements or siblings are asked for. */
void test_widths() {
    Case whole;
    const Floats noise = normal(whole);
    for (int64_t elements : {1, 3, 4, 17, 64, 2047, 2048, 2049, 4999}) {
        Case part;
        part.rows = 1, part.siblings = 1, part.elements = elements;
        const Floats start = normal(part);
        check(std::memcmp(start.data(), noise.data(), size_t(elements) * 4) == 0, "prefix", double(elements));
    }
}

Floats ramp(int64_t count, float slope) {
    Floats values(static_cast<size_t>(count));
    for (size_t i = 0; i < values.size(); i++) values[i] = slope * float(int(i % 97) - 48);
    return values;
}

tfk_array array(const Floats &values) { return {values.data(), TFK_FLOAT32}; }

void test_step() {
    const Case c;
    const Floats x = ramp(c.rows * c.elements, 0.02f), v = ramp(c.rows * c.elements, -0.03f), noise = normal(c);
    Floats next(noise.size()), log_prob(size_t(c.rows * c.siblings));
    const tfk_batch batch = c.batch();
    tfk_transition_step(&batch, array(x), array(v), {nullptr, 0}, 1.0, next.data(), log_prob.data());
    for (size_t i = 0; i < next.size(); i++) {
        const size_t row = i / size_t(c.siblings * c.elements), element = i % size_t(c.elements);
        const float *coef = c.coef.data() + 3 * row;
        const size_t flat = row * size_t(c.elements) + element;
        const float expected = coef[0] * x[flat] + coef[1] * v[flat] + coef[2] * noise[i];
        if (std::fabs(next[i] - expected) > 1e-6f) return check(false, "next", next[i] - expected);
    }
    check(std::fabs(log_prob[0] - float(-0.5 - std::log(0.3) - 0.918938533)) < 0.05f, "log_prob", log_prob[0]);
    check(log_prob[3] == 0.0f, "log_prob of an ODE row", log_prob[3]);
    Floats again(log_prob.size());
    tfk_transition_log_prob(&batch, array(next), array(x), array(v), again.data());
    for (size_t i = 0; i < again.size(); i++)
        check(std::fabs(again[i] - log_prob[i]) < 1e-6f, "log_prob of the drawn step", again[i] - log_prob[i]);
}

struct Loss {
    Case c;
    Floats v, old, advantages, terms{0.5f, 1 / 18.0f, -1 / 3.0f, 1 / 18.0f, 2.0f, 0, 0, 0};  // of c.coef, weights .5, 2
    Loss() : v(ramp(c.rows * c.elements, -0.03f)), old(ramp(c.rows * c.elements, -0.0301f)) {
        advantages = {1.0f, -0.5f, 0.25f, 1.0f, -1.0f, 0.5f};
    }
    tfk_branches branches() const { return {array(v), array(old), {}, {}, terms.data(), 0.0}; }
    double operator()(Floats *slopes = nullptr) {
        const tfk_batch batch = c.batch();
        const tfk_branches in = branches();
        Floats loss(1), stats(7), slope(6);
        tfk_branch_loss(&batch, &in, advantages.data(), 0.5, 0.5, loss.data(), stats.data(), slope.data());
        if (slopes) *slopes = slope;
        return double(loss[0]);
    }
};

/* Equal velocities: every ratio is 1, so the loss is minus the mean of weight * advantage. */
void test_loss() {
    Loss loss;
    loss.v = loss.old;
    const double expected = -(0.5 * 0.75 + 2.0 * 0.5) / 6;
    check(std::fabs(loss() - expected) < 1e-7, "loss at ratio 1", loss());
}

void test_gradient() {
    Loss loss;
    Floats slopes, gradient(loss.v.size());
    loss(&slopes);
    const tfk_batch batch = loss.c.batch();
    const tfk_branches in = loss.branches();
    tfk_velocity_gradient(&batch, &in, slopes.data(), 1.0, gradient.data(), TFK_FLOAT32);
    double along = 0;
    for (size_t i = 0; i < gradient.size(); i++) along += double(gradient[i]) * double(gradient[i]);
    const float length = float(0.05 / std::sqrt(along));
    Loss ahead = loss, behind = loss;
    for (size_t i = 0; i < gradient.size(); i++) {
        ahead.v[i] += length * gradient[i];
        behind.v[i] -= length * gradient[i];
    }
    const double slope = (ahead() - behind()) / (2.0 * double(length));
    check(std::fabs(slope / along - 1) < 1e-2, "finite difference over analytic gradient", slope / along);
    check(gradient[size_t(loss.c.elements)] == 0.0f, "gradient of an ODE row");
}

/* One call for loss and gradient equals the two calls, whether it keeps the noise or, above 8 MiB a row, draws again. */
void test_at_once(int64_t siblings, int64_t threads) {
    Loss loss;
    loss.c.siblings = siblings, loss.c.threads = threads;
    loss.advantages.assign(size_t(2 * siblings), 0.7f);
    const tfk_batch batch = loss.c.batch();
    const tfk_branches in = {array(loss.v), array(loss.old), array(loss.old), {}, loss.terms.data(), 0.1};
    Floats slopes(loss.advantages.size()), apart(loss.v.size()), once(loss.v.size()), stats(7), stats_once(7);
    float value, value_once;
    const float *advantages = loss.advantages.data();
    tfk_branch_loss(&batch, &in, advantages, 0.5, 0.5, &value, stats.data(), slopes.data());
    tfk_velocity_gradient(&batch, &in, slopes.data(), 1.0, apart.data(), TFK_FLOAT32);
    const int status =
        tfk_branch_loss_gradient(&batch, &in, advantages, 0.5, 0.5, &value_once, stats_once.data(), once.data());
    check(status == 0 && value == value_once && stats == stats_once, "loss and statistics of the one call", status);
    check(apart == once && once[0] != 0.0f, "gradient of the one call");
}

void test_at_once() {
    test_at_once(3, 1);
    test_at_once(200, 4);  // 1.3 M numbers a row: one row at a time
    test_at_once(450, 2);  // 2.8 M numbers a row: not kept
}

/* Results do not depend on the number of threads. */
void test_threads() {
    Case one;
    one.elements = 100001, one.threads = 1;
    Case many = one;
    many.threads = 5;
    check(normal(one) == normal(many), "noise");
    const Floats x = ramp(one.rows * one.elements, 0.02f);
    Floats next(size_t(6 * one.elements)), first(6), second(6);
    const tfk_batch batch_one = one.batch(), batch_many = many.batch();
    tfk_transition_step(&batch_one, array(x), array(x), {nullptr, 0}, 1.0, next.data(), first.data());
    tfk_transition_step(&batch_many, array(x), array(x), {nullptr, 0}, 1.0, next.data(), second.data());
    check(first == second, "log_prob");
}

}  // namespace

int main(int count, char **arguments) {
    const std::map<std::string, void (*)()> cases = {
        {"philox", test_philox}, {"normal", test_normal},     {"widths", test_widths},   {"step", test_step},
        {"loss", test_loss},     {"gradient", test_gradient}, {"threads", test_threads},
        {"at_once", test_at_once},
    };
    const auto found = cases.find(count > 1 ? arguments[1] : "");
    if (found == cases.end()) return std::printf("usage: test_native CASE\n"), 2;
    std::printf("instruction set: %s\n", tfk_instruction_set());
    found->second();
    return failed ? 1 : 0;
}
