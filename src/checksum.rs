//! Sums over bytes, which tell flipped bits and other content apart, but no forgery. They stand in files, so they stay as
//! they are.

use crate::rng::mix;

/// What a tensor adds to a checksum.
pub fn sum_of(name: &str, bytes: &[u8]) -> u64 {
    add(add(0, name.as_bytes()), bytes)
}

/// `sum` with `bytes` added, eight at a time.
pub fn add(sum: u64, bytes: &[u8]) -> u64 {
    let word = |bytes: &[u8]| {
        let mut word = [0; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        u64::from_le_bytes(word)
    };
    bytes.chunks(8).fold(mix(sum, bytes.len() as u64), |sum, bytes| mix(sum, word(bytes)))
}
