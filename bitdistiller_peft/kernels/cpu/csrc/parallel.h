// Split a range over threads: OpenMP where the compiler has it (then torch's own pool serves), else short-lived threads.

#pragma once

#include <algorithm>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#else
#include <system_error>
#include <thread>
#include <vector>
#endif

namespace bd {

#ifdef _OPENMP
constexpr int32_t kUsesOpenMp = 1;
#else
constexpr int32_t kUsesOpenMp = 0;
#endif

template <typename Function>
void parallel(int64_t size, int32_t threads, const Function& function) {
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, size / 8));
    if (parts <= 1) {
        if (size > 0) function(0, size);
        return;
    }
    const auto edge = [=](int64_t part) { return size * part / parts; };
#ifdef _OPENMP
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static, 1)
    for (int64_t part = 0; part < parts; ++part) function(edge(part), edge(part + 1));
#else
    std::vector<std::thread> helpers;
    int64_t started = 1;
    try {
        for (; started < parts; ++started) helpers.emplace_back(function, edge(started), edge(started + 1));
    } catch (const std::system_error&) {  // no more threads: this one does the rest
        function(edge(started), size);
    }
    function(edge(0), edge(1));
    for (auto& helper : helpers) helper.join();
#endif
}

}  // namespace bd
