// The work group that every shader is written for. 64 is the width of the widest SIMD unit of phone GPUs, and half of
// what Vulkan guarantees.
#define GROUP 64u

layout(local_size_x = 64) in;
