//! The fuzz targets (`fuzz/targets.rs`) over their seeds and over mutations of them, with no more than a stable compiler.
//!
//! Rounds are numbered, and a round's bytes depend on its number alone. `POCKETLORA_FUZZ_ROUNDS` wants more of them than
//! the few that a test can afford, `POCKETLORA_FUZZ_FROM` others.

#[path = "../../fuzz/targets.rs"]
mod targets;

use super::peak_bytes;
use std::fs;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A file of a few kilobytes that takes longer than this asks for too much.
const LONGEST: Duration = Duration::from_secs(20);
/// Address space that all rounds of all targets may take together: maps and stacks of threads are large, heaps are not.
const MOST_BYTES: u64 = 8 << 30;

/// SplitMix64.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

/// What sizes and counts in files are when they mean harm.
const NUMBERS: [u64; 12] =
    [0, 1, 7, 0x7f, 0xff, 0xffff, 0x7fff_ffff, 0xffff_ffff, 1 << 32, 1 << 40, i64::MAX as u64, u64::MAX];
/// The same, and other trouble, in files of text.
const WORDS: [&str; 16] = [
    "null",
    "-1",
    "0",
    "1e999",
    "18446744073709551616",
    "4294967295",
    "[]",
    "{}",
    "\"\"",
    "true",
    "\\u0000",
    "NaN",
    "[[[[[[[[",
    "{\"a\":",
    "{{",
    "{% for i in range(99999999) %}",
];

/// A few changes to one of `seeds`.
fn mutated(seeds: &[Vec<u8>], rng: &mut Rng) -> Vec<u8> {
    let mut bytes = seeds[rng.below(seeds.len())].clone();
    // Headers are at the beginning: half of the changes go there.
    let head = bytes.len().min(if rng.below(2) == 0 { 2000 } else { usize::MAX });
    for _ in 0..=rng.below(4) {
        let end = bytes.len().min(head);
        let at = rng.below(end.max(1)).min(bytes.len());
        let until = (at + rng.below(64)).min(bytes.len());
        match rng.below(10) {
            0 if at < bytes.len() => bytes[at] ^= 1 << rng.below(8),
            1 if at < bytes.len() => bytes[at] = rng.next() as u8,
            2 | 3 => {
                let (number, size) = (NUMBERS[rng.below(NUMBERS.len())].to_le_bytes(), [1, 2, 4, 8][rng.below(4)]);
                let size = size.min(bytes.len() - at);
                bytes[at..at + size].copy_from_slice(&number[..size]);
            }
            4 => drop(bytes.drain(at..until)),
            5 => {
                let part = bytes[at..until].repeat(1 + rng.below(8));
                drop(bytes.splice(at..at, part));
            }
            6 => bytes.truncate(at),
            7 => {
                let other = &seeds[rng.below(seeds.len())];
                let from = rng.below(other.len());
                let part = other[from..(from + rng.below(200)).min(other.len())].to_vec();
                drop(bytes.splice(at..until, part));
            }
            8 => drop(bytes.splice(at..at, WORDS[rng.below(WORDS.len())].bytes())),
            // A number in a text becomes another.
            _ => {
                let digits = |b: &u8| b.is_ascii_digit();
                if let Some(from) = bytes[at..].iter().position(digits).map(|n| at + n) {
                    let to = bytes[from..].iter().position(|b| !digits(b)).map_or(bytes.len(), |n| from + n);
                    drop(bytes.splice(from..to, WORDS[rng.below(WORDS.len())].bytes()));
                }
            }
        }
    }
    bytes
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// The seeds of `target`, and those files of the goldens that are of its kind.
fn seeds(target: &str) -> Vec<Vec<u8>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let list = |dir: PathBuf| fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
    let mut paths = list(root.join("fuzz/seeds").join(target));
    if target == "config" {
        paths.extend(list(root.join("tests/data/oracles/families")).iter().map(|dir| dir.join("config.json")));
    }
    paths.sort();
    paths.iter().filter(|path| path.is_file()).map(|path| fs::read(path).unwrap()).collect()
}

fn run(name: &str, target: fn(&[u8]), rounds: u64) {
    let seeds = seeds(name);
    assert!(!seeds.is_empty());
    let attempt = |what: &str, bytes: &[u8]| {
        let start = Instant::now();
        let outcome = catch_unwind(|| target(bytes));
        let took = start.elapsed();
        if outcome.is_err() || took > LONGEST {
            let path = std::env::temp_dir().join(format!("pocketlora-fuzz-{name}"));
            fs::write(&path, bytes).unwrap();
            panic!("{name}, {what}: a panic, or {took:?}; its bytes are in {}", path.display());
        }
    };
    for (i, seed) in seeds.iter().enumerate() {
        attempt(&format!("seed {i}"), seed);
    }
    let (from, rounds) = (setting("POCKETLORA_FUZZ_FROM", 0), setting("POCKETLORA_FUZZ_ROUNDS", rounds));
    for round in from..from + rounds {
        attempt(&format!("round {round}"), &mutated(&seeds, &mut Rng(round)));
    }
    if let Some(peak) = peak_bytes() {
        assert!(peak < MOST_BYTES, "{name}: {peak} bytes were asked for");
    }
}

#[test]
fn gguf() {
    run("gguf", targets::gguf, 400);
}

#[test]
fn safetensors() {
    run("safetensors", targets::safetensors, 300);
}

#[test]
fn adapter() {
    run("adapter", targets::adapter, 400);
}

#[test]
fn compressed() {
    run("compressed", targets::compressed, 400);
}

#[test]
fn tokenizer() {
    run("tokenizer", targets::tokenizer, 400);
}

#[test]
fn template() {
    run("template", targets::template, 150);
}

#[test]
fn config() {
    run("config", targets::config, 400);
}

#[test]
fn jsonl() {
    run("jsonl", targets::jsonl, 400);
}
