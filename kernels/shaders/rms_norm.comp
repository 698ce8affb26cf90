// y[t, c] = x[t, c] / sqrt(mean_c(x[t, c]^2) + eps) * w[c] (Zhang & Sennrich 2019), one work group a row.
#version 450
#extension GL_GOOGLE_include_directive : require
#include "shared/group.glsl"
#include "shared/sum.glsl"

layout(binding = 0, std430) readonly buffer W { float w[]; };
layout(binding = 1, std430) readonly buffer X { float x[]; };
layout(binding = 2, std430) writeonly buffer Y { float y[]; };

layout(push_constant) uniform Constants {
    uint rows;
    uint width;
    float eps;
};

void main() {
    for (uint row = gl_WorkGroupID.x; row < rows; row += gl_NumWorkGroups.x) {
        const uint start = row * width;
        float square = 0.0;
        for (uint c = gl_LocalInvocationID.x; c < width; c += GROUP) {
            square += x[start + c] * x[start + c];
        }
        // A division and a root, not `inversesqrt`: both are good to 3 ulp on every device.
        const float r = 1.0 / sqrt(group_sum(square) / float(width) + eps);
        for (uint c = gl_LocalInvocationID.x; c < width; c += GROUP) {
            y[start + c] = x[start + c] * r * w[c];
        }
    }
}
