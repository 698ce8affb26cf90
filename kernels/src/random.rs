//! Counted random numbers.

/// Random bits number `index` of the stream `key`: SplitMix64's output function (Steele, Lea & Flood 2014). A function
/// of its arguments alone, so streams can be entered anywhere and do not depend on the thread count.
#[must_use]
pub fn mix(key: u64, index: u64) -> u64 {
    let mut z = key.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
