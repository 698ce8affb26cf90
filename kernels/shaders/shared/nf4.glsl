// What all products with a weight in bitsandbytes' 4-bit blocks share (QLoRA, Dettmers et al. 2023): constants, the
// weight, its elements. It is read as 32-bit words because 8- and 16-bit storage are features that many phones lack.

layout(push_constant) uniform Constants {
    uint rows;
    uint cols;
    uint accumulate;   // add to y
    uint packed_at;    // word of the codes: two elements a byte, the even one in the high nibble
    uint scales_at;    // word of the blocks' scales: a byte each with double quantization, else an f32
    uint nested_at;    // word of the nested blocks' scales, an f32 each
    uint block_log2;   // elements a block, at least 32
    uint nested_block; // scales a nested block; 0: there is no second level
    uint dtype;        // what products are rounded to: 0 f32, 1 f16, 2 bf16
    float offset;      // mean of the scales
};

layout(binding = 0, std430) readonly buffer Weight { uint weight[]; };

// Words of the 16 code values and of the 256 values of the dynamic map, which only double quantization has.
const uint CODE_AT = 0u;
const uint MAP_AT = 16u;

// Scale of a block: product and sum are rounded apart, as bitsandbytes does, so they must not become an fma.
float nf4_scale(uint block) {
    if (nested_block == 0u) {
        return uintBitsToFloat(weight[scales_at + block]);
    }
    const uint code = (weight[scales_at + block / 4u] >> (block % 4u * 8u)) & 255u;
    const float outer = uintBitsToFloat(weight[nested_at + block / nested_block]);
    precise float inner = uintBitsToFloat(weight[MAP_AT + code]) * outer;
    precise float scale = inner + offset;
    return scale;
}

// Nearest f16, ties to even, as f32. By integers: `packHalf2x16` may round as the device likes.
float round_f16(float value) {
    const uint bits = floatBitsToUint(value);
    const uint magnitude = bits & 0x7fffffffu;
    uint rounded;
    if (magnitude >= 0x7f800000u) {
        return value; // infinity and NaN
    } else if (magnitude >= 0x38800000u) {
        // From 2^-14 on: 13 bits less. What rounds up to 2^16 is beyond the type.
        rounded = (magnitude + 0xfffu + (magnitude >> 13 & 1u)) & ~0x1fffu;
        rounded = rounded >= 0x47800000u ? 0x7f800000u : rounded;
    } else {
        // Subnormal in f16: a multiple of 2^-24. From 25 bits on nothing is left, also of f32's own subnormals.
        const uint drop = min(126u - (magnitude >> 23), 25u);
        const uint mantissa = (magnitude & 0x7fffffu) | 0x800000u;
        const uint units = (mantissa + (1u << (drop - 1u)) - 1u + (mantissa >> drop & 1u)) >> drop;
        rounded = floatBitsToUint(float(units) * 5.9604644775390625e-8);
    }
    return uintBitsToFloat(rounded | (bits & 0x80000000u));
}

// Nearest bf16, ties to even, as f32.
float round_bf16(float value) {
    const uint bits = floatBitsToUint(value);
    if ((bits & 0x7fffffffu) >= 0x7f800000u) {
        return value;
    }
    return uintBitsToFloat((bits + 0x7fffu + (bits >> 16 & 1u)) & ~0xffffu);
}

// The weight that bitsandbytes dequantizes a code value and a scale to, bit by bit on devices that round f32 products
// to the nearest, as all known do. Only f32's own subnormals may be flushed to zero.
float nf4_value(float code, float scale) {
    precise float product = code * scale;
    switch (dtype) {
        case 1u: return round_f16(product);
        case 2u: return round_bf16(product);
        default: return product;
    }
}

// Code number of an element by its place among the eight of a word.
uint nf4_nibble(uint word, uint i) {
    return (word >> (i / 2u * 8u + 4u - i % 2u * 4u)) & 15u;
}
