/* Work items on the calling thread and a few that live for one call. */
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace tempflow {

constexpr double kNanosecondsPerThread = 1e5;  // starting and joining a thread takes about a fifth of this

/* Calls task(i) for i in [0, count), on at most `threads` threads; `nanoseconds`: what one thread would need. */
template <typename Task>
void parallel_for(int64_t count, double nanoseconds, int64_t threads, const Task &task) {
    std::atomic<int64_t> next{0};
    const auto work = [&] {
        for (int64_t i = next++; i < count; i = next++) task(i);
    };
    const int64_t helpers = std::min({threads, count, 1 + int64_t(nanoseconds / kNanosecondsPerThread)}) - 1;
    std::vector<std::thread> pool;
    try {
        for (int64_t i = 0; i < helpers; i++) pool.emplace_back(work);
    } catch (const std::system_error &) {
        // The system grants no more threads: those that started and the caller do all of the work.
    }
    work();
    for (std::thread &thread : pool) thread.join();
}

}  // namespace tempflow
