// Fake quantization of float weights, forward and backward, and what its parameters are computed from.
//
// A weight comes as runs of consecutive floats; a run is a group, or a part of one. The formulas are those of
// bitdistiller_peft/quantizers, operation for operation, so that values equal the reference's bit for bit. They are
// written once, with the compiler's own vectors of eight floats, and compiled once for each instruction set (see
// kernels.cpp). Every instruction set adds in the same order.

#pragma once

#include <cstdint>
#include <cstring>

#define BD_SWEEP __attribute__((always_inline)) inline

enum FakeFamily : int32_t { kAffine = 0, kCodebook = 1, kResidual = 2, kFine = 3 };

extern "C" struct BdFake {
    const float* weight;
    const float* grad;    // backward: of the values
    const float* scale;   // one per group
    const float* second;  // zero points, negative or residual scales, or null
    float* out;           // the values; backward: the gradient of the weight, or null
    float* to_scale;      // backward, one per run
    float* to_second;     // backward, one per run; with zero points: the sum over clamped weights, in units of -scale
    int64_t runs, size, runs_per_group;
    int32_t family, num_levels;
    float max_code, zero_point;  // affine; the zero point of all groups where `second` is null
    float lowest, highest;       // codebook: weights beyond are clamped
    float levels[16], midpoints[16];
};

namespace bd {
namespace fake {

constexpr int kLanes = 8;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef double Doubles __attribute__((vector_size(8 * kLanes)));
typedef int32_t Mask __attribute__((vector_size(4 * kLanes)));

BD_SWEEP Floats all(float value) { return Floats{} + value; }
BD_SWEEP Floats load(const float* from) {
    Floats value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
BD_SWEEP Floats load_some(const float* from, int64_t count, float fill) {
    Floats value = all(fill);
    std::memcpy(&value, from, static_cast<size_t>(count) * 4);
    return value;
}
BD_SWEEP float sum_of(Floats lanes) {
    float total = 0.0f;
    for (int j = 0; j < kLanes; ++j) total += lanes[j];
    return total;
}

// Halves to even. Exact below 2**22; numbers beyond lie outside of every range of codes, rounded or not.
BD_SWEEP Floats rounded(Floats x) {
    const Floats magic = all(12582912.0f), sum = (x + magic) - magic;
    const Mask is_small = (x < 4194304.0f) & (x > -4194304.0f);
    return is_small ? sum : x;
}

BD_SWEEP Floats clamped(Floats code, float top) {
    code = code < 0.0f ? all(0.0f) : code;  // NaN stays
    return code > top ? all(top) : code;
}

// What a group stores, and what the gradients of both come to so far.
struct Group {
    Floats scale, second;
    bool is_swapped;
};
struct Sums {
    Floats scale, second;
};

BD_SWEEP Group group_of(const BdFake& call, int64_t run) {
    const int64_t group = run / call.runs_per_group;
    const float scale = call.scale[group];
    const float other = call.family == kAffine ? call.zero_point : call.family == kResidual ? scale / 2 : scale;
    const float second = call.second ? call.second[group] : other;
    return {all(scale), all(second), second > scale};
}

// ---------------------------------------------------------------------------- eight weights of a group, by family
// `values` are what their codes stand for. `slopes` adds to the gradients of scale and second parameter, and returns
// that of the weights: nothing for those outside of the range.

// Evenly spaced: the zero point is added after rounding if it is an integer, before if it need not be one.
template <bool kIsInteger>
struct Even {
    static BD_SWEEP Floats code_of(const Group& group, Floats steps) {
        return kIsInteger ? rounded(steps) + group.second : rounded(steps + group.second);
    }
    static BD_SWEEP Floats values(const BdFake& call, const Group& group, Floats w) {
        const Floats code = clamped(code_of(group, w / group.scale), call.max_code);
        return (code - group.second) * group.scale;
    }
    static BD_SWEEP Floats slopes(const BdFake& call, const Group& group, Floats w, Floats g, Sums& sums) {
        const Floats steps = w / group.scale, code = code_of(group, steps);
        const Mask inside = (code >= 0.0f) & (code <= call.max_code);
        const Floats offset = clamped(code, call.max_code) - group.second, kept = inside ? g : all(0.0f);
        sums.scale += g * (inside ? offset - steps : offset);
        sums.second += g - kept;
        return kept;
    }
};

struct Codebook {
    static BD_SWEEP Floats normalized(const Group& group, Floats w) {
        const Floats above = group.scale == 0.0f ? all(1.0f) : group.scale;
        const Floats below = group.second == 0.0f ? all(1.0f) : group.second;
        return w / (w < 0.0f ? below : above);
    }
    static BD_SWEEP Floats nearest(const BdFake& call, Floats x) {
        Floats level = all(call.levels[0]);
        for (int i = 0; i + 1 < call.num_levels; ++i) {
            level = x > call.midpoints[i] ? all(call.levels[i + 1]) : level;
        }
        return level;
    }
    static BD_SWEEP Floats values(const BdFake& call, const Group& group, Floats w) {
        const Floats level = nearest(call, normalized(group, w)), none = all(0.0f);
        return (level > 0.0f ? level : none) * group.scale + (level < 0.0f ? level : none) * group.second;
    }
    static BD_SWEEP Floats slopes(const BdFake& call, const Group& group, Floats w, Floats g, Sums& sums) {
        const Floats x = normalized(group, w), level = nearest(call, x), none = all(0.0f);
        const Mask inside = (x >= call.lowest) & (x <= call.highest), below = w < 0.0f;
        const Floats slope = g * (inside ? level - x : level);
        if (call.second) {
            sums.scale += below ? none : slope;
            sums.second += below ? slope : none;
        } else {
            sums.scale += slope;
        }
        return inside ? g : none;
    }
};

struct Residual {
    // The signs of scale and residual scale. Where the residual scale is the larger one, its sign is found first.
    static BD_SWEEP void signs(const Group& group, Floats w, Floats* first, Floats* second) {
        const Floats up = all(1.0f), down = all(-1.0f), larger = group.is_swapped ? group.second : group.scale;
        const Floats high = w >= 0.0f ? up : down;
        const Floats low = w >= (w < 0.0f ? -larger : larger) ? up : down;
        *first = group.is_swapped ? low : high;
        *second = group.is_swapped ? high : low;
    }
    static BD_SWEEP Floats values(const BdFake&, const Group& group, Floats w) {
        Floats first, second;
        signs(group, w, &first, &second);
        return first * group.scale + second * group.second;
    }
    static BD_SWEEP Floats slopes(const BdFake&, const Group& group, Floats w, Floats g, Sums& sums) {
        Floats first, second;
        signs(group, w, &first, &second);
        sums.scale += first * g;
        sums.second += second * g;
        return g;
    }
};

// --------------------------------------------------------------------------------------------------------- whole runs

template <typename Family>
BD_SWEEP void forward_of(const BdFake& call, int64_t first, int64_t last) {
    for (int64_t run = first; run < last; ++run) {
        const Group group = group_of(call, run);
        const float* w = call.weight + run * call.size;
        float* out = call.out + run * call.size;
        int64_t at = 0;
        for (; at + kLanes <= call.size; at += kLanes) {
            const Floats made = Family::values(call, group, load(w + at));
            std::memcpy(out + at, &made, sizeof made);
        }
        if (const int64_t rest = call.size - at) {
            const Floats made = Family::values(call, group, load_some(w + at, rest, 0.0f));
            std::memcpy(out + at, &made, static_cast<size_t>(rest) * 4);
        }
    }
}

template <typename Family>
BD_SWEEP void backward_of(const BdFake& call, int64_t first, int64_t last) {
    for (int64_t run = first; run < last; ++run) {
        const Group group = group_of(call, run);
        const int64_t end = (run + 1) * call.size;
        Sums sums{all(0.0f), all(0.0f)};
        int64_t at = run * call.size;
        for (; at + kLanes <= end; at += kLanes) {
            const Floats made = Family::slopes(call, group, load(call.weight + at), load(call.grad + at), sums);
            if (call.out) std::memcpy(call.out + at, &made, sizeof made);
        }
        if (const int64_t rest = end - at) {
            const Floats w = load_some(call.weight + at, rest, 0.0f), g = load_some(call.grad + at, rest, 0.0f);
            const Floats made = Family::slopes(call, group, w, g, sums);
            if (call.out) std::memcpy(call.out + at, &made, static_cast<size_t>(rest) * 4);
        }
        call.to_scale[run] = sum_of(sums.scale);
        call.to_second[run] = sum_of(sums.second);
    }
}

BD_SWEEP void forward(const BdFake& call, int64_t first, int64_t last) {
    switch (call.family) {
        case kAffine: return forward_of<Even<true>>(call, first, last);
        case kFine: return forward_of<Even<false>>(call, first, last);
        case kCodebook: return forward_of<Codebook>(call, first, last);
        default: return forward_of<Residual>(call, first, last);
    }
}

BD_SWEEP void backward(const BdFake& call, int64_t first, int64_t last) {
    switch (call.family) {
        case kAffine: return backward_of<Even<true>>(call, first, last);
        case kFine: return backward_of<Even<false>>(call, first, last);
        case kCodebook: return backward_of<Codebook>(call, first, last);
        default: return backward_of<Residual>(call, first, last);
    }
}

// ------------------------------------------------------------------------------------------------ ends, means, places

BD_SWEEP Floats lower(Floats a, Floats b) { return (b < a) | (b != b) ? b : a; }
BD_SWEEP Floats higher(Floats a, Floats b) { return (b > a) | (b != b) ? b : a; }

// Lowest and highest weight of each run; NaN where it holds one.
BD_SWEEP void ends(const float* weight, int64_t size, float* low, float* high, int64_t first, int64_t last) {
    for (int64_t run = first; run < last; ++run) {
        const float* w = weight + run * size;
        Floats least = all(w[0]), most = least;
        int64_t at = 0;
        for (; at + kLanes <= size; at += kLanes) {
            const Floats x = load(w + at);
            least = lower(least, x);
            most = higher(most, x);
        }
        if (at < size) {
            const Floats x = load_some(w + at, size - at, w[0]);
            least = lower(least, x);
            most = higher(most, x);
        }
        low[run] = least[0];
        high[run] = most[0];
        for (int j = 1; j < kLanes; ++j) {
            if (least[j] < low[run] || least[j] != least[j]) low[run] = least[j];
            if (most[j] > high[run] || most[j] != most[j]) high[run] = most[j];
        }
    }
}

// Sum of magnitudes of each run, in fp64.
BD_SWEEP void magnitudes(const float* weight, int64_t size, double* sums, int64_t first, int64_t last) {
    for (int64_t run = first; run < last; ++run) {
        const float* w = weight + run * size;
        Doubles lanes{};
        for (int64_t at = 0; at < size; at += kLanes) {
            const Floats x = at + kLanes <= size ? load(w + at) : load_some(w + at, size - at, 0.0f);
            lanes += __builtin_convertvector(x < 0.0f ? -x : x, Doubles);
        }
        double total = 0.0;
        for (int j = 0; j < kLanes; ++j) total += lanes[j];
        sums[run] = total;
    }
}

BD_SWEEP int64_t place_of(const float* w, int64_t size, float value) {
    for (int64_t i = 0; i < size; ++i) {
        if (w[i] == value) return i;
    }
    return 0;
}

}  // namespace fake
}  // namespace bd
