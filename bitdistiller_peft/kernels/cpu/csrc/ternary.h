// Ternary weights times activations in 8-bit integers, one scale per token: what happens before and after the sums.
//
//     largest = max(max|x|, 1e-5)      code = round(x * ((1 / largest) * 127))      step = largest / 127
//     out = sum * scale * step + bias
//
// in fp32, operation for operation as bitdistiller_peft/quantizers/activation.py and kernels/ops.py have it, so that
// results equal theirs bit for bit. The sums between are those of integers.h.

#pragma once

#include "fake.h"
#include "integers.h"
#include "layout.h"

namespace bd {
namespace ternary {

constexpr float kMaxCode = 127.0f, kSmallestRange = 1e-5f;

typedef uint16_t Brains __attribute__((vector_size(2 * fake::kLanes)));

struct Activations {
    const void* x;  // [tokens, cols]
    bool bfloat;
    int64_t cols, units;
    int8_t* codes;    // [tokens, units * 32], zeroed, as integers.h wants them
    int32_t* totals;  // [tokens], sums of codes
    float* steps;     // [tokens]
};

BD_SWEEP fake::Floats load_eight(const Activations& call, int64_t token, int64_t at) {
    const int64_t from = token * call.cols + at, count = call.cols - at < fake::kLanes ? call.cols - at : fake::kLanes;
    const float* floats = static_cast<const float*>(call.x) + from;
    if (!call.bfloat) return count == fake::kLanes ? fake::load(floats) : fake::load_some(floats, count, 0.0f);
    const uint16_t* brains = static_cast<const uint16_t*>(call.x) + from;
    Brains bits = {};
    if (count == fake::kLanes) std::memcpy(&bits, brains, sizeof bits);
    else std::memcpy(&bits, brains, static_cast<size_t>(count) * 2);
    return (fake::Floats)(__builtin_convertvector(bits, fake::Mask) << 16);
}

// The largest magnitude. NaN is passed over: its code is NaN, and is seen there.
BD_SWEEP float largest_of(const Activations& call, int64_t token) {
    fake::Floats top = fake::all(kSmallestRange);
    for (int64_t at = 0; at < call.cols; at += fake::kLanes) {
        const fake::Floats v = load_eight(call, token, at);
        const fake::Floats magnitude = v < 0.0f ? -v : v;
        top = magnitude > top ? magnitude : top;
    }
    float largest = kSmallestRange;
    for (int j = 0; j < fake::kLanes; ++j) {
        if (top[j] > largest) largest = top[j];
    }
    return largest;
}

// A token with a code that is no number has a step that is none, hence only such outputs.
BD_SWEEP void quantize(const Activations& call, int64_t token) {
    const float largest = largest_of(call, token);
    const fake::Floats factor = fake::all(1.0f / largest * kMaxCode);  // torch divides a number by a tensor so
    int8_t* codes = call.codes + token * call.units * kUnit;
    fake::Floats sums = {};
    for (int64_t at = 0; at < call.cols; at += fake::kLanes) {
        const fake::Floats code = fake::rounded(load_eight(call, token, at) * factor);
        sums += code;
        const fake::Floats number = code == code ? code : fake::all(0.0f);
        const int64_t place = integers::place_of(at, call.units), stride = integers::step_of(at, call.units);
        for (int j = 0; j < fake::kLanes; ++j) codes[place + j * stride] = static_cast<int8_t>(number[j]);
    }
    const float total = fake::sum_of(sums);
    const bool is_number = total == total;
    call.totals[token] = is_number ? static_cast<int32_t>(total) : 0;
    call.steps[token] = is_number ? largest / kMaxCode : total;
}

struct Finish {
    const int32_t* sums;  // [tokens, rows]
    const float* scales;  // [rows]
    const float* steps;
    const float* bias;  // or null
    void* out;
    bool bfloat;
    int64_t rows;
};

template <typename Number, typename Rounded>
BD_SWEEP void finish(const Finish& call, int64_t token, Rounded rounded) {
    const int32_t* sums = call.sums + token * call.rows;
    const float step = call.steps[token];
    Number* out = static_cast<Number*>(call.out) + token * call.rows;
    for (int64_t row = 0; row < call.rows; ++row) {
        const float value = static_cast<float>(sums[row]) * call.scales[row] * step;
        out[row] = rounded(call.bias ? value + call.bias[row] : value);
    }
}

BD_SWEEP void activations(const Activations& call, int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token) quantize(call, token);
}

BD_SWEEP void outputs(const Finish& call, int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token) {
        if (call.bfloat) finish<uint16_t>(call, token, to_bfloat);
        else finish<float>(call, token, [](float value) { return value; });
    }
}

}  // namespace ternary
}  // namespace bd
