// Needs `group.glsl`.

shared float partial[GROUP];

// Sum of `value` over the work group. Pairs are added in a fixed order, so the result is the same bits in every run.
// All invocations must get here together.
float group_sum(float value) {
    const uint lane = gl_LocalInvocationID.x;
    barrier(); // a sum before this one may still be being read
    partial[lane] = value;
    barrier();
    for (uint width = GROUP / 2u; width > 0u; width /= 2u) {
        if (lane < width) {
            partial[lane] += partial[lane + width];
        }
        barrier();
    }
    return partial[0];
}
