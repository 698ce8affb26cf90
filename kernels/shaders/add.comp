// y = a + b, or y += a if `in_place`; b is ignored then, because no two bindings of a shader may alias.
#version 450
#extension GL_GOOGLE_include_directive : require
#include "shared/group.glsl"

layout(binding = 0, std430) readonly buffer A { float a[]; };
layout(binding = 1, std430) readonly buffer B { float b[]; };
layout(binding = 2, std430) buffer Y { float y[]; };

layout(push_constant) uniform Constants {
    uint len;
    uint in_place;
};

void main() {
    // A stride, for the number of work groups is limited.
    for (uint i = gl_GlobalInvocationID.x; i < len; i += gl_NumWorkGroups.x * GROUP) {
        y[i] = a[i] + (in_place != 0u ? y[i] : b[i]);
    }
}
