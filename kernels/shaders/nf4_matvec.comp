// y[o] = sum_k W[o, k] x[k], or added to y, for a weight in 4-bit blocks; one work group a row.
#version 450
#extension GL_GOOGLE_include_directive : require
#include "shared/group.glsl"
#include "shared/nf4.glsl"
#include "shared/sum.glsl"

layout(binding = 1, std430) readonly buffer X { float x[]; };
layout(binding = 2, std430) buffer Y { float y[]; };

shared float code[16];

// Rows of whole words, which lie within one block each: a word is eight weights and one scale.
float by_words(uint row) {
    float sum = 0.0;
    const uint first = row * (cols / 8u);
    for (uint i = gl_LocalInvocationID.x; i < cols / 8u; i += GROUP) {
        const uint word = weight[packed_at + first + i];
        const float scale = nf4_scale((first + i) >> (block_log2 - 3u));
        for (uint j = 0u; j < 8u; j++) {
            sum += nf4_value(code[nf4_nibble(word, j)], scale) * x[8u * i + j];
        }
    }
    return sum;
}

// Rows that begin within a word, and blocks that end within one.
float by_elements(uint row) {
    float sum = 0.0;
    for (uint k = gl_LocalInvocationID.x; k < cols; k += GROUP) {
        const uint at = row * cols + k;
        const uint number = nf4_nibble(weight[packed_at + at / 8u], at % 8u);
        sum += nf4_value(code[number], nf4_scale(at >> block_log2)) * x[k];
    }
    return sum;
}

void main() {
    const uint lane = gl_LocalInvocationID.x;
    if (lane < 16u) {
        code[lane] = uintBitsToFloat(weight[CODE_AT + lane]);
    }
    barrier();
    for (uint row = gl_WorkGroupID.x; row < rows; row += gl_NumWorkGroups.x) {
        const float sum = group_sum(cols % 8u == 0u ? by_words(row) : by_elements(row));
        if (lane == 0u) {
            y[row] = accumulate != 0u ? y[row] + sum : sum;
        }
    }
}
