// Ternary weights times activations in 8-bit integers, one scale per token: what happens before and after the sums.
//
//     largest = max(max|x|, 1e-5)      code = round(x * ((1 / largest) * 127))      step = largest / 127
//     out = sum * scale * step + bias
//
// in fp32, operation for operation as bitdistiller_peft/quantizers/activation.py and kernels/ops.py have it, so that
// results equal theirs bit for bit. Codes are written as bf16, which holds them.

#pragma once

#include "fake.h"
#include "layout.h"

namespace bd {
namespace ternary {

constexpr float kMaxCode = 127.0f, kSmallestRange = 1e-5f;

struct Activations {
    const void* x;  // [tokens, cols]
    bool bfloat;
    int64_t cols;
    float* row;       // room for one row
    uint16_t* codes;  // [tokens, cols]
    float* steps;     // [tokens]
};

// The largest magnitude. NaN is passed over: its code is NaN, and with it every sum.
BD_SWEEP float largest_of(const float* x, int64_t cols) {
    fake::Floats top = fake::all(kSmallestRange);
    for (int64_t at = 0; at < cols; at += fake::kLanes) {
        const int64_t rest = cols - at;
        const fake::Floats v = rest < fake::kLanes ? fake::load_some(x + at, rest, 0.0f) : fake::load(x + at);
        const fake::Floats magnitude = v < 0.0f ? -v : v;
        top = magnitude > top ? magnitude : top;
    }
    float largest = kSmallestRange;
    for (int j = 0; j < fake::kLanes; ++j) {
        if (top[j] > largest) largest = top[j];
    }
    return largest;
}

BD_SWEEP void quantize(const Activations& call, int64_t token) {
    const float* x = static_cast<const float*>(call.x) + token * call.cols;
    if (call.bfloat) {
        const uint16_t* brains = static_cast<const uint16_t*>(call.x) + token * call.cols;
        for (int64_t col = 0; col < call.cols; ++col) call.row[col] = from_bfloat(brains[col]);
        x = call.row;
    }
    const float largest = largest_of(x, call.cols);
    const fake::Floats factor = fake::all(1.0f / largest * kMaxCode);  // torch divides a number by a tensor so
    uint16_t* codes = call.codes + token * call.cols;
    for (int64_t at = 0; at < call.cols; at += fake::kLanes) {
        const int64_t rest = call.cols - at, count = rest < fake::kLanes ? rest : fake::kLanes;
        const fake::Floats v = rest < fake::kLanes ? fake::load_some(x + at, rest, 0.0f) : fake::load(x + at);
        const fake::Floats code = fake::rounded(v * factor);
        for (int j = 0; j < count; ++j) codes[at + j] = static_cast<uint16_t>(float_to_bits(code[j]) >> 16);
    }
    call.steps[token] = largest / kMaxCode;
}

struct Finish {
    const float* sums;  // [tokens, rows]
    const void* scale;  // [rows], or one
    int32_t scale_type, per_matrix;
    const float* steps;
    const float* bias;  // or null
    void* out;
    bool bfloat;
    int64_t rows;
};

BD_SWEEP void finish(const Finish& call, int64_t token) {
    for (int64_t row = 0; row < call.rows; ++row) {
        const float scale = load_scale(call.scale, call.per_matrix ? 0 : row, call.scale_type);
        float value = call.sums[token * call.rows + row] * scale * call.steps[token];
        if (call.bias) value += call.bias[row];
        if (call.bfloat) static_cast<uint16_t*>(call.out)[token * call.rows + row] = to_bfloat(value);
        else static_cast<float*>(call.out)[token * call.rows + row] = value;
    }
}

BD_SWEEP void activations(const Activations& call, int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token) quantize(call, token);
}

BD_SWEEP void outputs(const Finish& call, int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token) finish(call, token);
}

}  // namespace ternary
}  // namespace bd
